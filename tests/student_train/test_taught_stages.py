"""Stages with several teachers: packs, terms, held-out figures, resume and identity, against a teacher at a time."""

from __future__ import annotations

import json

import pytest
import torch

from shared.errors import TrainingError
from shared.recipe.recipe import Stage
from student_train.batch.collate import collate
from student_train.batch.dataset import PackDataset
from student_train.batch.stage_terms import terms_at
from student_train.batch.target_batch import targets_in
from student_train.evaluate.heldout_measure import Processes, measure_heldout
from student_train.operator.loss_terms import term_keys
from student_train.stage.stage_identity import stage_identity
from student_train.stage.stage_run import _student, arguments_of
from student_train.stage.stage_work import resolve_stage
from student_train.student.student import load_student
from tests.student_train.conftest import read_bytes
from tests.student_train.tiny_caches import add_layer, make_cache

KL = [{"name": "forward_kl"}]
BOTH = [{"layer": "first", "weight": 0.25}, {"layer": "second", "weight": 0.75, "sources": ["ops"]}]


@pytest.fixture(scope="session")
def taught(tiny):
    """A cache with layers `first` and `second`, of two teachers over rows of math and ops."""
    from tests.tiny_models import make_qwen3

    cache = make_cache(tiny.root / "taught", tiny.teacher, layer=False)
    add_layer(cache, tiny.teacher, "first")
    add_layer(cache, make_qwen3(tiny.root / "other teacher", seed=8), "second", k=5)
    return cache


@pytest.fixture
def stage_of(recipe_of, taught):
    """Return a function that resolves a stage over both layers."""

    def build(targets, losses=KL, **settings):
        recipe = recipe_of(cache=[taught], losses=losses, targets=targets, **settings)
        return resolve_stage(recipe, recipe.stages[0])

    return build


def pack_of(work, index=0):
    return PackDataset(work.caches, work.plan, work.temperatures)[index]


def test_a_pack_holds_what_each_teacher_says_of_its_rows(stage_of):
    work, first, second = stage_of(BOTH), stage_of("first"), stage_of("second")
    assert work.plan.hash == first.plan.hash
    batch = targets_in(collate([pack_of(work, 0), pack_of(work, 1)]))
    assert list(batch) == ["first", "second"]
    for key, alone in (("first", first), ("second", second)):
        whole = targets_in(collate([pack_of(alone, 0), pack_of(alone, 1)]))
        chosen = batch[key].positions
        torch.testing.assert_close(batch[key].tail_logmass, whole.tail_logmass[chosen])
        own = batch[key].members(slice(0, len(chosen)), 1.0, 512, torch.float64, with_draws=False)
        all_of_it = whole.members(slice(0, whole.num_positions), 1.0, 512, torch.float64, with_draws=False)
        torch.testing.assert_close(own.ids, all_of_it.ids[chosen])
        torch.testing.assert_close(own.log_p, all_of_it.log_p[chosen])
    rows = [int(row) for pack in (0, 1) for row in work.plan.rows_of(pack)]
    is_ops = [work.caches.source_names[work.caches.sources[row]] == "ops" for row in rows]
    lengths = [work.caches[row].num_positions for row in rows]
    of_ops = torch.tensor(is_ops).repeat_interleave(torch.tensor(lengths)).nonzero()[:, 0]
    assert torch.equal(batch["second"].positions, of_ops)
    assert len(batch["first"].positions) == sum(lengths)


def test_weights_of_teachers_multiply_those_of_losses_and_may_move():
    moving = {"kind": "linear", "start": 1.0, "end": 0.0}
    losses = [{"name": "jsd", "weight": 0.5}, {"name": "cross_entropy", "weight": 0.1}]
    targets = [{"layer": "a", "weight": moving}, {"layer": "b", "sources": ["x"]}, {"layer": "b", "sources": ["y"]}]
    stage = Stage.model_validate({"name": "kd", "losses": losses, "targets": targets})
    weights = [
        {key: term.weight for key, term in zip(term_keys(terms), terms, strict=True)}
        for terms in (terms_at(stage, step, 5) for step in (0, 1, 4))
    ]
    assert weights[0] == {"jsd@a": 0.5, "jsd@b": 0.5, "jsd@b_2": 0.5, "cross_entropy": 0.1}
    assert [step["jsd@a"] for step in weights] == [0.5, 0.375, 0.0]


def heldout_of(work):
    base = load_student(work.student, None, work.caches)
    model, objective = _student(work, arguments_of(work), base)
    packs = work.heldout.packs(192)
    return measure_heldout(model, objective, work.heldout, packs, Processes(0, 1, torch.device("cpu"), lambda x: x))


def test_heldout_figures_are_each_teachers_own_and_their_weighted_mean(stage_of):
    settings = {"evaluate": {"every_steps": 6}}
    both, one, two = (heldout_of(stage_of(targets, **settings)) for targets in (BOTH, "first", "second"))
    assert both["by_layer"]["first"]["kl_nats"] == pytest.approx(one["kl_nats"], rel=1e-6)
    assert both["by_layer"]["second"]["kl_nats"] == pytest.approx(two["by_source"]["ops"]["kl_nats"], rel=1e-6)
    assert both["by_layer"]["second"]["rows"] == two["by_source"]["ops"]["rows"] < both["rows"]
    assert both["by_source"]["math"]["kl_nats"] == pytest.approx(one["by_source"]["math"]["kl_nats"], rel=1e-6)
    mean = 0.25 * one["by_source"]["ops"]["kl_nats"] + 0.75 * two["by_source"]["ops"]["kl_nats"]
    assert both["by_source"]["ops"]["kl_nats"] == pytest.approx(mean, rel=1e-6)
    assert both["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)


@pytest.mark.slow
def test_a_killed_stage_of_two_teachers_ends_as_if_it_had_not_been(recipe_of, taught, run_apart):
    ends = []
    for name, failpoint in (("whole", None), ("killed", "train_step.after_write@5")):
        settings = {"balance": {"kind": "uncertainty"}, "evaluate": {"every_steps": 2}}
        recipe = recipe_of(cache=[taught], losses=KL, targets=BOTH, name=name, **settings)
        if failpoint:
            assert run_apart(recipe, failpoint) != 0
        assert run_apart(recipe) == 0
        names = ("metrics.jsonl", "evaluations.jsonl", "model/model.safetensors")
        ends.append(read_bytes(recipe.stage_dir(name), *names))
    assert ends[0] == ends[1]
    steps = [json.loads(line) for line in ends[0]["metrics.jsonl"].decode().splitlines()]
    assert set(steps[-1]["terms"]) == {"forward_kl@first", "forward_kl@second"}


def test_layers_weights_and_sources_make_another_stage(stage_of):
    changed = [
        BOTH,
        [BOTH[0]],
        [BOTH[0], {**BOTH[1], "weight": 0.5}],
        [BOTH[0], {**BOTH[1], "sources": ["math"]}],
        [{**BOTH[0], "layer": "second", "sources": ["math"]}, BOTH[1]],
    ]
    identities = [json.dumps(stage_identity(stage_of(targets)), sort_keys=True) for targets in changed]
    assert len(set(identities)) == len(changed)


@pytest.mark.parametrize(
    ("targets", "losses", "sentence"),
    [
        ([{"layer": "first", "sources": ["mth"]}], KL, "mth"),
        ([{"layer": "third"}], KL, "third"),
        ([{"layer": "first", "sources": ["ops"]}], KL, "'math', which no layer of its `targets` teaches"),
        (BOTH, [{"name": "forward_kl", "temperature": 3.0}], "was not captured"),
    ],
)
def test_teachers_that_cannot_be_are_refused(stage_of, targets, losses, sentence):
    from shared.errors import CacheError

    with pytest.raises((TrainingError, CacheError), match=sentence):
        stage_of(targets, losses)


def test_rows_without_a_teacher_train_the_other_losses(stage_of):
    losses = [*KL, {"name": "cross_entropy", "weight": 0.1}]
    work = stage_of([{"layer": "first", "sources": ["ops"]}], losses, evaluate={"every_steps": 5})
    assert set(work.heldout.rows) == {"ops"}  # there is no distance to a teacher on the others
    assert int(work.caches.untaught.sum()) == 24


@pytest.mark.parametrize(
    ("targets", "losses", "sentence"),
    [
        ([{"layer": "a", "weight": 0}], KL, "always 0"),
        ([{"layer": "a"}, {"layer": "a", "sources": ["x"]}], KL, "twice"),
        ([{"layer": "a"}], [{"name": "cross_entropy"}], "no loss of the stage is a divergence"),
        ([], KL, "at least 1"),
    ],
)
def test_contradictions_are_refused_in_the_recipe(targets, losses, sentence):
    with pytest.raises(ValueError, match=sentence):
        Stage.model_validate({"name": "kd", "losses": losses, "targets": targets})
