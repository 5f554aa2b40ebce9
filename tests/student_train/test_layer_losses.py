"""Losses on a hidden layer against dense references, through whole students: packs, checkpointing, adapters,
accumulation.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoConfig, AutoModelForCausalLM

from shared.errors import TrainingError
from shared.identity.hidden_identity import FINAL
from shared.recipe.recipe import Adapter, Loss
from shared.recipe.sections.losses import OnHiddenLayer
from student_train.batch.collate import collate
from student_train.batch.dataset import CacheList, build_pack
from student_train.batch.hidden_batch import HiddenReading
from student_train.batch.stage_terms import terms_at
from student_train.fit.hidden_memory import hidden_memory
from student_train.fit.model_shape import shape_of
from student_train.layers.layer_losses import LayerLosses, pairs_of, pool_rows
from student_train.layers.layer_map import pair_layers
from student_train.layers.projections import MODULE
from student_train.layers.student_attention import stored_masses
from student_train.layers.student_watch import AttentionInputs
from student_train.losses import LossTerm, representations
from student_train.losses.hidden_layers.attention import attention_kl
from student_train.losses.hidden_layers.contrastive import info_nce
from student_train.losses.hidden_layers.hidden import hidden_distance
from student_train.losses.hidden_layers.representation import Representation
from student_train.student.forward_patch import Objective, patch_forward
from student_train.student.row_attention import NAME as ROW_ATTENTION
from student_train.student.row_attention import switch_attention
from student_train.student.student import add_adapter
from student_train.student.student_head import head_of
from tests.student_train.hidden_caches import add_hidden
from tests.student_train.tiny_caches import make_cache
from tests.tiny_models import make_qwen3

EVERYTHING = {"layers": [1, 2, "final"], "pooled": "mean", "attention": {"layers": [1, 2], "strongest": 4}}
READS = frozenset({"states", "attention", "pooled"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("layers")
    teacher = make_qwen3(root / "teacher", seed=1, hidden_size=96)
    cache = add_hidden(make_cache(root / "cache", teacher, num_rows=12), teacher, **EVERYTHING)
    student = make_qwen3(root / "student", seed=2, spread=0.2, num_layers=3)
    return CacheList.open([cache], None, hidden=[True]), student


@pytest.mark.parametrize(("metric", "normalise"), [("mse", True), ("mse", False), ("cosine", True)])
def test_hidden_distance_and_its_gradient_are_those_of_the_formula(metric: str, normalise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    t = torch.randn(5, 7, generator=generator, dtype=torch.float64) * 30
    value = hidden_distance(x, t, metric=metric, normalise=normalise)
    value.sum().backward()
    xn, tn = x.detach().numpy(), t.numpy()
    if metric == "cosine":
        lengths = np.linalg.norm(xn, axis=1, keepdims=True), np.linalg.norm(tn, axis=1, keepdims=True)
        cosine = (xn * tn).sum(1, keepdims=True) / (lengths[0] * lengths[1])
        expected, gradient = 1 - cosine[:, 0], (xn / lengths[0] * cosine - tn / lengths[1]) / lengths[0]
    else:
        tn = tn / np.sqrt((tn**2).mean(1, keepdims=True)) if normalise else tn
        expected, gradient = ((xn - tn) ** 2).mean(1), 2 * (xn - tn) / 7
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(x.grad.numpy(), gradient, rtol=1e-7, atol=1e-10)


def test_attention_kl_is_the_kl_over_keys_and_bucket() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5), 6), rng.dirichlet(np.ones(5), 6)
    student = torch.tensor(q, requires_grad=True)
    value = attention_kl(student[:, :4], student[:, 4], torch.tensor(p[:, :4]), torch.tensor(p[:, 4]))
    np.testing.assert_allclose(value.detach().numpy(), (p * np.log(p / q)).sum(1), rtol=1e-9)
    value.sum().backward()
    np.testing.assert_allclose(student.grad.numpy(), -p / q, rtol=1e-9)
    same = torch.tensor(p)
    assert float(attention_kl(same[:, :4], same[:, 4], same[:, :4], same[:, 4]).abs().max()) < 1e-12


def test_info_nce_and_its_gradient_are_those_of_the_formula() -> None:
    rng = np.random.default_rng(1)
    x, t = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)) * 5
    student = torch.tensor(x, requires_grad=True)
    value = info_nce(student, torch.tensor(t), tau=0.3)
    s, u = x / np.linalg.norm(x, axis=1, keepdims=True), t / np.linalg.norm(t, axis=1, keepdims=True)
    scores = np.exp(s @ u.T / 0.3)
    weights = scores / scores.sum(1, keepdims=True)
    np.testing.assert_allclose(value.detach().numpy(), -np.log(np.diag(weights)), rtol=1e-9)
    assert torch.autograd.gradcheck(lambda z: info_nce(z, torch.tensor(t), tau=0.3), (student,))
    value.sum().backward()
    by_unit = (weights @ u - u) / 0.3
    by_x = (by_unit - (by_unit * s).sum(1, keepdims=True) * s) / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(student.grad.numpy(), by_x, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_stored_masses_are_those_of_dense_attention_over_each_row(window, softcap, monkeypatch) -> None:
    monkeypatch.setattr("student_train.layers.student_attention.SCORES_AT_ONCE", 30)  # several chunks per row
    generator = torch.Generator().manual_seed(0)
    lengths, heads, groups, width = (5, 8, 1, 6), 4, 2, 3
    total = sum(lengths)
    query = torch.randn(heads, total, width, generator=generator, dtype=torch.float64, requires_grad=True)
    key = torch.randn(groups, total, width, generator=generator, dtype=torch.float64, requires_grad=True)
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    predictors = torch.tensor([2, 3, 6, 7, 12, 13, 15, 18])
    places = position_ids[predictors]
    distances = torch.where(torch.arange(3) <= places[:, None], torch.arange(3).expand(len(places), 3), -1)
    inputs = AttentionInputs(query, key, 0.7, window, softcap)
    masses, rest = stored_masses(inputs, predictors, position_ids, distances)
    scores = torch.einsum("abd,acd->abc", query, key.repeat_interleave(heads // groups, 0)) * 0.7
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(total)[:, None] - torch.arange(total)
    seen = (row[:, None] == row) & (distance >= 0) & (distance < (window or total))
    dense = scores.masked_fill(~seen, -torch.inf).softmax(-1).mean(0)
    expected = (
        dense[predictors]
        .gather(1, (predictors[:, None] - distances).clamp_max(total - 1))
        .masked_fill(distances < 0, 0.0)
    )
    torch.testing.assert_close(masses, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rest, (1 - expected.sum(1)).float(), rtol=1e-5, atol=1e-6)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad((masses * weights).sum() + 0.3 * rest.sum(), (query, key))
    wanted = torch.autograd.grad((expected * weights).sum() + 0.3 * (1 - expected.sum(1)).sum(), (query, key))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_no_supervised_position_gives_masses_of_no_position() -> None:
    inputs = AttentionInputs(torch.ones(2, 4, 3, requires_grad=True), torch.ones(1, 4, 3), 1.0, None, None)
    empty = torch.zeros(0, dtype=torch.int64)
    masses, rest = stored_masses(inputs, empty, torch.arange(4), torch.zeros(0, 5, dtype=torch.int64))
    assert (masses.shape, rest.shape) == ((0, 5), (0,))


@pytest.mark.parametrize("how", ["mean", "last"])
def test_pooling_takes_each_rows_own_states(how: str) -> None:
    states = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    owner = torch.tensor([0, 0, -1, -1, 1, 2, 2])
    rows = [states[:2], states[4:5], states[5:7]]
    expected = torch.stack([row.mean(0) if how == "mean" else row[-1] for row in rows])
    torch.testing.assert_close(pool_rows(states, owner, 3, how), expected)


def test_layers_are_paired_by_depth_or_as_given_and_wrong_ones_refused() -> None:
    assert [(p.teacher, p.student) for p in pair_layers("hidden", (6, 12, 18, FINAL), 32, 24, None)] == [
        (6, 4),
        (12, 9),
        (18, 14),
        (FINAL, FINAL),
    ]
    given = pair_layers("hidden", (6, FINAL), 32, 24, {"final": 3, "6": "final"})
    assert [(p.teacher, p.student, p.column) for p in given] == [(FINAL, 3, 1), (6, FINAL, 0)]
    with pytest.raises(TrainingError, match="maps teacher layer 7, which the hidden layer does not keep"):
        pair_layers("hidden", (6,), 32, 24, {"7": 1})
    with pytest.raises(TrainingError, match="layer 25 of a student that has 24"):
        pair_layers("attention", (6,), 32, 24, {"6": 25})


@pytest.mark.parametrize(("reads", "key"), [("states", "`layers`"), ("attention", "`attention`"), ("pooled", "pooled")])
def test_a_loss_that_is_added_is_paired_counted_and_refused_by_what_it_reads(tiny, monkeypatch, reads, key) -> None:
    class Added(OnHiddenLayer):
        name: Literal["added"] = "added"

    monkeypatch.setitem(representations, "added", Representation(hidden_distance, reads=reads))
    identity, losses = HiddenReading(tiny[0].caches[0].hidden_layer, READS).identity, [Added()]
    assert [pair.teacher for pair in pairs_of(losses, identity, 3).get("added", ())] == {
        "states": [1, 2, FINAL],
        "attention": [1, 2],
        "pooled": [],
    }[reads]
    shape = shape_of(AutoConfig.from_pretrained(tiny[1]))
    assert hidden_memory(losses, identity, shape, residual_bytes=4, attention_bytes=4).working > 0
    nothing = dataclasses.replace(identity, layers=(), attention_layers=(), pooled="none")
    with pytest.raises(TrainingError, match=f"keeps nothing that loss 'added' needs; .*{key}.* and run"):
        pairs_of(losses, nothing, 3)


LOSSES = [
    {"name": "hidden", "weight": 0.7},
    {"name": "attention", "weight": 1.3, "layer_map": {1: 2, 2: 3}},
    {"name": "contrastive", "weight": 0.4, "tau": 0.5},
]


class Run:
    """One student with losses on a hidden layer, and its batches."""

    def __init__(self, tiny, *, attention="sdpa", adapter="none", checkpointing=False, losses=None, terms=True):
        self.caches, student = tiny
        self.reading = HiddenReading(self.caches.caches[0].hidden_layer, READS)
        self.base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, attn_implementation="sdpa")
        if attention == ROW_ATTENTION:
            switch_attention(self.base, ROW_ATTENTION)
        self.model = add_adapter(self.base, Adapter.model_validate(adapter), seed=3)
        if checkpointing:
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
            if self.model is not self.base:
                self.base.enable_input_require_grads()
        self.losses = [TypeAdapter(Loss).validate_python(loss) for loss in (losses or LOSSES)]
        self.objective = Objective(head_of(self.base, self.caches.vocab_size))
        self.objective.layers = LayerLosses(self.base, self.losses, self.reading.identity, seed=5)
        stage = type("Stage", (), {"losses": self.losses, "targets": None})
        self.objective.terms = terms_at(stage, 0, 1) if terms else []
        patch_forward(self.base, self.objective)
        self.model.train()

    def batch(self, rows: list[int], limit: int = 64) -> dict:
        return collate([build_pack([self.caches[i] for i in rows], limit, None, self.caches.vocab_size, self.reading)])

    def gradients(self, batches: list[dict]) -> tuple[float, dict, dict]:
        """Loss, values and gradients by name, summed over batches, divided by all their positions."""
        self.model.zero_grad()
        total = sum(len(batch["labels"]) for batch in batches)
        loss = 0.0
        for batch in batches:
            output = self.model(**batch, num_items_in_batch=torch.tensor(total))
            output.loss.backward()
            loss += output.loss.item()
        values = {name: float(value) for name, value in self.objective.take().items()}
        grads = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return loss, values, grads


def dense_values(run: Run, rows: list[int], attention_layers: tuple[int, int] = (2, 3)) -> dict[str, torch.Tensor]:
    """The three values by plain loops over rows, with the model's own eager attention, in float32 with gradient."""
    eager = run.base
    body = eager.model
    before = eager.config._attn_implementation
    eager.set_attn_implementation("eager")
    projections = getattr(eager, MODULE)
    pooled_student, pooled_teacher = [], []
    hidden_sum, attention_sum, count = 0.0, 0.0, 0
    for index in rows:
        row = run.caches[index]
        ids = torch.from_numpy(row.token_ids.astype(np.int64))[None]
        blocks: dict[int, torch.Tensor] = {}
        handles = [
            block.register_forward_hook(
                lambda m, i, o, n=n, to=blocks: to.__setitem__(n, o[0] if isinstance(o, tuple) else o)
            )
            for n, block in enumerate(body.layers, start=1)
        ]
        output = body(input_ids=ids, use_cache=False, output_attentions=True)
        for handle in handles:
            handle.remove()
        predicting = torch.from_numpy(row.predictor_index().astype(np.int64))
        final = output.last_hidden_state[0][predicting]
        teacher = torch.from_numpy(row.hidden.states.dense())
        for column, (name, student) in enumerate((("1", 2), ("2", 3), ("final", None))):
            states = final if student is None else blocks[student].reshape(len(ids[0]), -1)[predicting]
            x = projections[f"teacher_{name}_student_{'final' if student is None else student}"](states)
            t = teacher[column] / teacher[column].square().mean(-1, keepdim=True).sqrt()
            hidden_sum = hidden_sum + (x - t).square().mean(-1).sum() / 3
        for column, student in enumerate(attention_layers):
            averaged = output.attentions[student - 1][0].mean(0)
            kept = row.hidden.attention[column]
            ends = np.cumsum(kept.counts)
            for s, q in enumerate(predicting.tolist()):
                part = slice(ends[s] - kept.counts[s], ends[s])
                p = torch.from_numpy(kept.masses[part].astype(np.float64))
                keys = torch.from_numpy(q - kept.distances[part].astype(np.int64))
                mine = averaged[q, keys].double()
                if len(keys) == q + 1:
                    value = (p / p.sum() * (p / p.sum() / mine).log()).sum()
                else:
                    rest, others = 1 - p.sum(), averaged[q].double().sum() - mine.sum()
                    value = (p * (p / mine).log()).sum() + torch.xlogy(rest, rest) - rest * others.log()
                attention_sum = attention_sum + value / 2
        pooled_student.append(projections["pooled"](final.mean(0)))
        pooled_teacher.append(torch.from_numpy(row.hidden.pooled.dense()))
        count += len(predicting)
    eager.set_attn_implementation(before)
    s = torch.nn.functional.normalize(torch.stack(pooled_student), dim=-1)
    t = torch.nn.functional.normalize(torch.stack(pooled_teacher), dim=-1)
    nce = torch.nn.functional.cross_entropy(s @ t.T / 0.5, torch.arange(len(rows)))
    return {"hidden": hidden_sum / count, "attention": attention_sum / count, "contrastive": nce}


@pytest.mark.parametrize("attention", ["sdpa", ROW_ATTENTION])
def test_values_and_gradients_through_a_pack_are_those_of_rows_alone(tiny, attention: str) -> None:
    run = Run(tiny, attention=attention)
    rows = [0, 3, 5, 9]
    batch = run.batch(rows)
    loss, values, got = run.gradients([batch])
    run.model.zero_grad()
    dense = dense_values(run, rows)
    for name, value in dense.items():
        assert values[name] == pytest.approx(float(value), rel=2e-4)
    total = 0.7 * dense["hidden"] + 1.3 * dense["attention"] + 0.4 * dense["contrastive"]
    assert loss == pytest.approx(float(total), rel=2e-4)
    total.backward()
    expected = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    head = {name for name in got if name not in expected}
    assert all(float(got[name].abs().max()) == 0 for name in head)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=2e-3, atol=2e-5 * float(gradient.abs().max() + 1e-3))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_checkpointing_changes_no_gradient(tiny, adapter: str) -> None:
    plain = Run(tiny, adapter=adapter)
    loss, _, expected = plain.gradients([plain.batch([0, 1, 2])])
    again = Run(tiny, adapter=adapter, checkpointing=True)
    other, _, got = again.gradients([again.batch([0, 1, 2])])
    assert other == pytest.approx(loss, rel=1e-6)
    assert got.keys() == expected.keys()
    if adapter == "lora":
        assert any("lora_" in name for name in got)
        assert all("lora_" in name or MODULE in name for name in got)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)


def test_accumulation_equals_one_batch_where_rows_do_not_meet(tiny) -> None:
    run = Run(tiny, losses=LOSSES[:2])
    loss, values, expected = run.gradients([run.batch([0, 1, 2, 3, 4])])
    other, split, got = run.gradients([run.batch([0, 1]), run.batch([2, 3, 4])])
    assert other == pytest.approx(loss, rel=1e-6)
    for name in ("hidden", "attention"):
        assert split[name] == pytest.approx(values[name], rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def test_contrastive_passes_add_up_to_a_mean_weighted_by_their_positions(tiny) -> None:
    run = Run(tiny, losses=LOSSES[2:])
    parts = [run.batch([0, 1]), run.batch([2, 3, 4])]
    _, split, _ = run.gradients(parts)
    alone = [run.gradients([part])[1]["contrastive"] for part in parts]
    counts = [len(part["labels"]) for part in parts]
    assert split["contrastive"] == pytest.approx(float(np.average(alone, weights=counts)), rel=1e-5)
    _, single, gradients = run.gradients([run.batch([2])])
    assert single["contrastive"] == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients.values())


def test_cut_row_keeps_its_first_positions_and_has_no_pooled_state(tiny) -> None:
    run = Run(tiny)
    row = run.caches[4]
    limit = int(row.spans[0, 0]) + 3
    cut = run.batch([4, 1], limit=limit)
    whole = run.batch([4], limit=512)
    count = int((cut["pooled_row"] == -1).sum())
    assert count >= 3
    torch.testing.assert_close(cut["states_integers"][:3], whole["states_integers"][:3])
    torch.testing.assert_close(cut["attention_codes"][:3], whole["attention_codes"][:3])
    _, values, _ = run.gradients([cut])
    assert np.isfinite(list(values.values())).all()
    assert values["contrastive"] == 0


def test_batch_without_a_supervised_position_has_a_loss_of_zero(tiny) -> None:
    run = Run(tiny)
    batch = run.batch([4], limit=4)
    assert len(batch["labels"]) == 0
    loss, _, gradients = run.gradients([batch])
    assert loss == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients.values())


def test_losses_on_the_head_and_inside_add_up(tiny) -> None:
    run = Run(tiny)
    batch = run.batch([0, 1])
    inside, _, _ = run.gradients([batch])
    run.objective.terms = [*run.objective.terms, LossTerm("cross_entropy", 0.5)]
    both, values, gradients = run.gradients([batch])
    assert both == pytest.approx(inside + 0.5 * values["cross_entropy"], rel=1e-6)
    assert set(values) == {"loss", "hidden", "attention", "contrastive", "cross_entropy"}
    assert float(gradients["model.embed_tokens.weight"].abs().max()) > 0


def test_eager_attention_and_missing_pooled_states_are_refused(tiny) -> None:
    run = Run(tiny)
    run.base.set_attn_implementation("eager")
    with pytest.raises(TrainingError, match=r"cannot see through student.attention 'eager'"):
        run.gradients([run.batch([0])])
    identity = run.reading.identity
    without = dataclasses.replace(identity, pooled="none")
    with pytest.raises(TrainingError, match="keeps nothing that loss 'contrastive' needs"):
        LayerLosses(run.base, run.losses[2:], without, seed=0)


def test_removing_leaves_the_student_as_it_was(tiny) -> None:
    run = Run(tiny)
    assert any(MODULE in name for name in run.base.state_dict())
    run.objective.layers.remove()
    assert not any(MODULE in name for name in run.base.state_dict())
    assert not any(block._forward_hooks for block in run.base.model.layers)
