"""The Python interface: light to import, documented by examples that run, its losses against dense mathematics."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.recipe.sections.losses import LOSSES, NEEDS_DRAWS, OnTargets, names_of

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("numpy", "pyarrow", "torch", "vllm", "transformers", "datasets", "pydantic", "pandas", "matplotlib")


def test_importing_it_loads_nothing_heavy() -> None:
    code = f"import decant, sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == []


def test_every_public_name_exists_has_a_docstring_and_is_listed() -> None:
    import decant

    assert dir(decant) == sorted(decant.__all__)
    for name in decant.__all__:
        assert getattr(decant, name).__doc__, name
    page = (ROOT / "docs" / "python.md").read_text()
    assert [name for name in decant.__all__ if name.islower() and not re.search(rf"\b{name}\b", page)] == []
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = decant.nothing


@pytest.mark.parametrize("module", ["decant.reading", "decant.torch_dataset", "decant.losses"])
def test_examples_in_docstrings_hold(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = doctest.testmod(import_module(module))
    assert found.attempted > 2
    assert found.failed == 0


def test_examples_of_the_page_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = doctest.testfile(str(ROOT / "docs" / "python.md"), module_relative=False)
    assert found.attempted > 20
    assert found.failed == 0


def _batch(temperatures=None):
    import decant

    cache = decant.open_cache(ROOT / "data/golden/run-1/cache")
    data = decant.TorchDataset(cache, pack_tokens=128, temperatures=temperatures)
    return data.collate([data[0], data[1]])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for kind in LOSSES
        if issubclass(kind, OnTargets)
        for name in names_of(kind)
        if name not in NEEDS_DRAWS
        for options in ({}, {"temperature": 2.0}, {"head_temperature": 3.0})
        if options.keys() <= kind.model_fields.keys()
    ],
)
def test_fused_and_plain_loss_agree_in_value_and_gradient(name: str, options: dict[str, float]) -> None:
    import torch

    import decant

    batch = _batch()
    torch.manual_seed(0)
    tokens = batch["input_ids"].shape[1]
    hidden = torch.randn(1, tokens, 16, dtype=torch.float64, requires_grad=True)
    head = torch.randn(512, 16, dtype=torch.float64, requires_grad=True)
    terms = [
        replace(getattr(decant, name)(0.8, **options), by_entropy=name == "decoupled_kl"),
        decant.cross_entropy(0.2),
    ]
    fused = decant.sparse_loss(hidden, head, batch, terms)
    fused_gradients = torch.autograd.grad(fused, [hidden, head])
    plain = decant.sparse_loss_from_logits(hidden @ head.T, batch, terms)
    plain_gradients = torch.autograd.grad(plain, [hidden, head])
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)
    for one, other in zip(fused_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_a_linear_head_with_a_bias_and_a_share_of_a_global_batch() -> None:
    import torch

    import decant

    batch = _batch()
    torch.manual_seed(1)
    hidden = torch.randn(1, batch["input_ids"].shape[1], 16)
    head = torch.nn.Linear(16, 512)
    terms = [decant.cross_entropy()]
    whole = decant.sparse_loss(hidden, head, batch, terms)
    logits = head(hidden[0][batch["predictor_index"]])
    torch.testing.assert_close(whole, torch.nn.functional.cross_entropy(logits, batch["labels"]))
    half = decant.sparse_loss(hidden, head, batch, terms, num_positions=2.0 * len(batch["labels"]))
    torch.testing.assert_close(half, whole / 2)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("granite", {"logits_scaling": 0.25}),
        ("cohere", {"logit_scale": 3.0}),
        ("phi", {}),  # a head with a bias
    ],
)
def test_a_model_as_head_gives_the_loss_of_its_own_logits(family: str, changes: dict[str, float]) -> None:
    import torch

    import decant
    from tests.tiny_families import make_family

    batch, terms = _batch(), [decant.forward_kl(0.9, temperature=2.0), decant.cross_entropy(0.1)]
    model = make_family(family, spread=0.3, attention="sdpa", **changes)
    model.resize_token_embeddings(512)
    model = model.double()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    fused = decant.sparse_loss(hidden, model, batch, terms)
    expected = decant.sparse_loss_from_logits(model(**inputs, use_cache=False).logits, batch, terms)
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)
    linear = model.get_output_embeddings()
    cap = changes.get("final_logit_softcapping")
    scale = changes.get("logit_scale", 1.0) / changes.get("logits_scaling", 1.0)
    told = decant.sparse_loss(hidden, linear, batch, terms, logit_scale=scale, softcap=cap)
    torch.testing.assert_close(told, fused)
    if changes:
        assert abs(float((decant.sparse_loss(hidden, linear, batch, terms) - expected).detach())) > 0.1
        with pytest.raises(decant.DecantError, match="says its logit_scale and softcap itself"):
            decant.sparse_loss(hidden, model, batch, terms, softcap=1.0)


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_model_under_an_adapter_gives_the_loss_and_gradients_of_its_own_logits(settings: dict[str, Any]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    import decant
    from tests.tiny_families import make_family

    plain = make_family("llama", spread=0.3)
    plain.resize_token_embeddings(512)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False, **settings)
    model, batch = get_peft_model(plain, config), _batch()
    terms = [decant.forward_kl(0.9, temperature=2.0), decant.cross_entropy(0.1)]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    hidden = plain.model(**inputs, use_cache=False).last_hidden_state
    fused = decant.sparse_loss(hidden, model, batch, terms)
    expected = decant.sparse_loss_from_logits(model(**inputs, use_cache=False).logits, batch, terms)
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)
    found, wanted = torch.autograd.grad(fused, trained), torch.autograd.grad(expected, trained)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_on_the_output_layer_is_refused_as_it_would_not_be_trained(use_dora: bool) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    import decant
    from tests.tiny_families import make_family

    plain = make_family("llama", spread=0.3)
    plain.resize_token_embeddings(512)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], use_dora=use_dora)
    model, batch = get_peft_model(plain, config), _batch()
    hidden = torch.zeros(1, batch["input_ids"].shape[1], 64)
    for head in (model, plain, plain.get_output_embeddings()):
        with pytest.raises(decant.DecantError, match=r"adapter on it.*leave it out of target_modules"):
            decant.sparse_loss(hidden, head, batch, [decant.cross_entropy()])


def test_a_model_with_a_twist_of_its_own_is_refused_as_head() -> None:
    import torch

    import decant
    from tests.tiny_families import make_family

    model = make_family("llama", spread=0.3)
    model.resize_token_embeddings(512)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    batch = _batch()
    hidden = torch.zeros(1, batch["input_ids"].shape[1], 64)
    with pytest.raises(decant.DecantError, match="computes its logits in a way that its config does not declare"):
        decant.sparse_loss(hidden, model, batch, [decant.cross_entropy()])


def test_what_cannot_be_had_is_refused_in_a_sentence(tmp_path: Path) -> None:
    import torch

    import decant

    cache = decant.open_cache(ROOT / "data/golden/run-1/cache")
    with pytest.raises(decant.DecantError, match="temperature 3 was not captured, only 1, 2"):
        decant.TorchDataset(cache, temperatures=[3.0])
    with pytest.raises(decant.DecantError, match="is not a cache"):
        decant.open_cache(tmp_path)
    with pytest.raises(decant.DecantError, match="gopher"):
        decant.open_cache("gopher://bucket/cache")
    batch = _batch([1.0])
    hidden = torch.zeros(1, batch["input_ids"].shape[1], 4)
    with pytest.raises(decant.DecantError, match="was not captured"):
        decant.sparse_loss(hidden, torch.zeros(512, 4), batch, [decant.forward_kl(1, 2.0)])
    with pytest.raises(IndexError, match="row 24 of 24"):
        _ = cache[24]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda d: d.jsd(beta=2), "jsd: beta: expected less than 1, found 2"),
        (lambda d: d.skew_reverse_kl(skew=1.0), "skew_reverse_kl: skew: expected less than 1, found 1.0"),
        (lambda d: d.decoupled_kl(head_temperature=0), "decoupled_kl: head_temperature: .*, found 0"),
        (lambda d: d.forward_kl(temperature=-1.0), "forward_kl: temperature: .*, found -1.0"),
        (lambda d: d.forward_kl("x"), "forward_kl: weight: expected a number, found 'x'"),
        (lambda d: d.TorchDataset("runs/demo/cache"), "as decant.open_cache returns it, found 'runs/demo/cache'"),
        (lambda d: d.TorchDataset(_golden(), pack_tokens=0), "pack_tokens: expected .*, found 0"),
        (lambda d: d.TorchDataset(_golden(), epochs=0), "epochs: expected greater than 0, found 0"),
        (lambda d: d.TorchDataset(_golden(), seed=-1), "seed: expected greater than or equal to 0, found -1"),
        (
            lambda d: d.TorchDataset(_golden(), heldout_fraction=1.0),
            "heldout_fraction: expected less than 1, found 1.0",
        ),
        (lambda d: _loss_of(d.forward_kl()), r"terms: expected a list such as \[decant.forward_kl\(0.9\)\], found"),
        (lambda d: _loss_of("forward_kl"), "terms: expected a list"),
    ],
)
def test_options_that_no_recipe_may_have_are_refused_in_a_sentence(make, sentence) -> None:
    import decant

    with pytest.raises(decant.DecantError, match=f"^(expected a cache )?{sentence}"):
        make(decant)


def _golden():
    import decant

    return decant.open_cache(ROOT / "data/golden/run-1/cache")


def _loss_of(terms):
    import torch

    import decant

    batch = _batch([1.0])
    return decant.sparse_loss(torch.zeros(len(batch["labels"]), 4), torch.zeros(512, 4), batch, terms)


@pytest.mark.parametrize("whole", [False, True])
def test_states_of_another_shape_than_the_batch_are_refused(whole: bool) -> None:
    import torch

    import decant

    def loss(values, batch):
        if whole:
            return decant.sparse_loss_from_logits(values, batch, [decant.forward_kl()])
        return decant.sparse_loss(values, torch.zeros(512, 512), batch, [decant.forward_kl()])

    batch = _batch([1.0])
    tokens, positions = batch["input_ids"].shape[1], len(batch["labels"])
    assert loss(torch.zeros(1, tokens, 512), batch) == loss(torch.zeros(positions, 512), batch)
    for shape in ([2, tokens, 512], [1, tokens + 1, 512], [1, tokens - 1, 512], [tokens, 512], [1, 1, tokens, 512]):
        with pytest.raises(decant.DecantError, match=rf"expected shape \[1, {tokens}, \.\.\.\] of all tokens"):
            loss(torch.zeros(shape), batch)
    with pytest.raises(decant.DecantError, match=r"expected real numbers, and a batch as TorchDataset\.collate"):
        loss(torch.zeros(1, tokens, 512, dtype=torch.int64), batch)
    with pytest.raises(decant.DecantError, match=r"a batch as TorchDataset\.collate"):
        loss(torch.zeros(1, tokens, 512), decant.TorchDataset(_golden(), pack_tokens=128)[0])
    with pytest.raises(decant.DecantError, match="was found where the student's head has tokens 0 to 6"):
        decant.sparse_loss_from_logits(torch.zeros(positions, 7), batch, [decant.cross_entropy()])


def test_any_number_is_a_weight() -> None:
    import torch

    import decant

    assert decant.forward_kl(-0.5).weight == -0.5
    assert decant.jsd(np.float32(0.5), beta=np.float64(0.1)).options == {"beta": 0.1}
    assert decant.cross_entropy(torch.tensor(2.0)).weight == 2.0


def test_a_slice_is_packed_alone_and_held_out_prompts_stay_out() -> None:
    import decant
    from shared.keys import is_heldout

    cache = decant.open_cache(ROOT / "data/golden/run-1/cache")
    data = decant.TorchDataset(cache[:5], pack_tokens=64)
    rows = {int(row) for pack in range(len(data)) for row in data._packs.plan.rows_of(pack)}
    assert rows == set(range(5))
    kept = decant.TorchDataset(cache, pack_tokens=64, heldout_fraction=0.3)
    rows = {int(row) for pack in range(len(kept)) for row in kept._packs.plan.rows_of(pack)}
    assert rows == {row.index for row in cache if not is_heldout(row.group_key, 0.3)}


def test_packs_are_a_sequence_that_ends() -> None:
    import decant

    data = decant.TorchDataset(_golden(), pack_tokens=128)
    packs = list(data)
    assert len(packs) == len(data) > 1 and all(len(pack["labels"]) for pack in packs)
    assert (data[-1]["input_ids"] == packs[-1]["input_ids"]).all()
    for index in (len(data), -len(data) - 1):
        with pytest.raises(IndexError):
            _ = data[index]


def test_phases_run_a_recipe_and_return_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    import decant

    shutil.copytree(ROOT / "data/golden/run-1", tmp_path / "run-1")
    monkeypatch.chdir(tmp_path / "run-1")
    recipe = decant.load_recipe("recipe.yaml")
    assert decant.teach(recipe)["reused_rows"] == 24
    assert decant.train(recipe) == {name: Path("run/train") / name / "model" for name in ("sft", "kd")}
    assert set(decant.evaluate("recipe.yaml")) == {"base", "kd"}
    assert "models" in decant.report("run")
    assert (tmp_path / "run-1/run/report.html").is_file()


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples/notebook.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "examples")}})
    client.execute()
    said = [o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", [])]
    assert any("nats per position" in text for text in said)
