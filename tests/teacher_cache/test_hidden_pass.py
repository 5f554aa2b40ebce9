"""A hidden layer against the same model run by hand; added to a cache, it generates and scores nothing again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.errors import EngineError, RecipeError, UsageError
from shared.identity.hidden_identity import FINAL
from shared.payload.projection import projection_matrix
from shared.recipe.recipe import Recipe
from teacher_cache.build import teach
from teacher_cache.engines.transformers.hidden_engine import HiddenEngine
from teacher_cache.engines.transformers.transformers_model import CausalModel
from teacher_cache.passes.hidden_pass import hidden_identity
from teacher_cache.teacher.teacher_identity import know_teacher
from tests.shared.small_cache import tree
from tests.teacher_cache.test_build_end_to_end import ROOT, SCRIPT
from tests.tiny_models import make_llama, make_qwen3
from tools import cli
from tools.plan.planner import plan, plan_text

EVERYTHING = {"layers": [1, 3, "final"], "pooled": "mean", "attention": {"layers": [2, 3], "strongest": 5}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("models") / "teacher", num_layers=3, seed=7)


def recipe(tmp_path: Path, teacher: Path, hidden: dict | None, **teacher_settings) -> Recipe:
    prompts = tmp_path / "prompts.jsonl"
    if not prompts.exists():
        talk = [
            {"prompt": f"How many {thing}?", "completion": f"There are {n * 7} of the {thing}." * (1 + n % 3)}
            for n, thing in THINGS
        ]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in talk))
    return Recipe.model_validate(
        {
            "name": "test",
            "output_dir": str(tmp_path / "run"),
            "teacher": {
                "model": str(teacher),
                "engine": "transformers",
                "dtype": "float32",
                "max_model_len": 128,
                "batch_tokens": 200,
                **teacher_settings,
            },
            "prompts": [{"source": "math", "path": str(prompts), "format": "prompt_completion"}],
            "capture": {"k": 4, "hidden": hidden},
            "cache": str(tmp_path / "cache"),
            "rows_per_part": 4,
        }
    )


THINGS = list(enumerate(("apples", "disks", "servers", "trains", "alarms", "lines", "pods"), start=1))


def reference(teacher: Path, token_ids: np.ndarray) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states [T, W] of the embeddings, every block and, last, the final norm; attention [T, T]
    of every block."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32, attn_implementation="eager")
    last_block: list[torch.Tensor] = []
    model.base_model.layers[-1].register_forward_hook(lambda module, inputs, output: last_block.append(output))
    with torch.no_grad():
        output = model(
            torch.tensor(token_ids.astype(np.int64))[None], output_hidden_states=True, output_attentions=True
        )
    states = [state[0] for state in output.hidden_states]
    block = last_block[0][0] if isinstance(last_block[0], tuple) else last_block[0]
    states = [*states[:-1], block.reshape(states[-1].shape), states[-1]]
    return states, [attention[0].mean(0) for attention in output.attentions]


@pytest.fixture(scope="module")
def built(tmp_path_factory, teacher: Path) -> Path:
    path = tmp_path_factory.mktemp("built")
    teach(recipe(path, teacher, EVERYTHING))
    return path


def test_states_are_those_that_predict_the_supervised_tokens(built: Path, teacher: Path) -> None:
    cache = Cache.open(built / "cache", hidden=True, verify=True)
    assert cache.hidden_layer is not None
    assert cache.hidden_layer.layers == (1, 3, FINAL)
    assert list(verify_cache(built / "cache")) == []
    for row in cache:
        states, _ = reference(teacher, row.token_ids)
        predicting = row.predictor_index().astype(np.int64)
        assert row.hidden is not None
        for i, number in enumerate((1, 3, 4)):
            expected = states[number][predicting].numpy()
            bound = np.abs(expected).max(axis=1, keepdims=True) / 254 + 1e-4
            assert (np.abs(row.hidden.states.dense()[i] - expected) <= bound).all()
        pooled = states[4][predicting].mean(0).numpy()
        assert np.abs(row.hidden.pooled.dense() - pooled).max() <= np.abs(pooled).max() / 254 + 1e-4


def test_attention_keeps_the_strongest_keys_of_the_models_own_eager_attention(built: Path, teacher: Path) -> None:
    cache = Cache.open(built / "cache", hidden=True)
    for row in cache:
        _, attention = reference(teacher, row.token_ids)
        predicting = row.predictor_index()
        for kept, layer in zip(row.hidden.attention, (2, 3), strict=True):
            ends = np.cumsum(kept.counts)
            for s, query in enumerate(predicting.tolist()):
                part = slice(ends[s] - kept.counts[s], ends[s])
                dense = attention[layer - 1][query].numpy()
                strongest = np.sort(dense)[::-1][: kept.counts[s]]
                np.testing.assert_allclose(kept.masses[part], strongest, atol=2e-5)
                np.testing.assert_allclose(dense[query - kept.distances[part]], strongest, atol=2e-5)
                assert kept.counts[s] == min(5, query + 1)
                assert kept.rest_codes[s] / 65535 == pytest.approx(1 - strongest.sum(), abs=1e-4)


def test_hidden_layer_on_an_existing_cache_generates_and_scores_nothing(
    tmp_path: Path, teacher: Path, capsys, monkeypatch
) -> None:
    first = teach(recipe(tmp_path, teacher, None))
    assert first.scored.rows == 7
    assert first.hidden_layer is None
    before = tree(tmp_path / "cache")
    second = teach(recipe(tmp_path, teacher, EVERYTHING))
    assert (second.generated.rows, second.imported.rows, second.scored.rows, second.hidden.rows) == (0, 0, 0, 7)
    assert (
        f"hidden layer {second.hidden_layer}: reused 0 rows, captured 7 with transformers on the same weights"
        in second.lines()
    )
    assert any(line.startswith("reused 7 rows (2 parts), generated 0, scored 0") for line in second.lines())
    after = tree(tmp_path / "cache")
    assert {name: data for name, data in after.items() if not name.startswith("hidden/")} == before
    monkeypatch.setattr(CausalModel, "load", lambda *a, **k: pytest.fail("a build with nothing to do loads no model"))
    third = teach(recipe(tmp_path, teacher, EVERYTHING))
    assert (third.hidden.rows, third.hidden_reused_rows) == (0, 7)
    assert not third.computed
    assert tree(tmp_path / "cache") == after
    assert cli.main(["cache", "ls", str(tmp_path / "cache")]) == 0
    listed = capsys.readouterr().out
    assert "layers 1, 3, final, pooled mean, attention of layers 2, 3, strongest 5 keys" in listed
    assert cli.main(["cache", "stats", str(tmp_path / "cache")]) == 0
    assert "bytes per position" in capsys.readouterr().out


def test_new_part_lacks_only_its_own_states(tmp_path: Path, teacher: Path, built: Path) -> None:
    teach(recipe(tmp_path, teacher, EVERYTHING))
    directory = next((tmp_path / "cache/hidden").iterdir())
    whole = tree(directory)
    victim = sorted(directory.glob("part-*.arrow"))[0]
    victim.unlink()
    victim.with_suffix(".json").unlink()
    again = teach(recipe(tmp_path, teacher, EVERYTHING))
    assert (again.hidden.rows, again.hidden_reused_rows) == (4, 3)
    assert tree(directory) == whole


def test_partitions_share_the_pass(tmp_path: Path, teacher: Path, built: Path) -> None:
    shares = [teach(recipe(tmp_path, teacher, EVERYTHING), partition=(i, 2)) for i in range(2)]
    assert sorted(share.hidden.rows for share in shares) == [3, 4]
    assert (
        tree(next((tmp_path / "cache/hidden").iterdir())).keys()
        == tree(next((built / "cache/hidden").iterdir())).keys()
    )
    Cache.open(tmp_path / "cache", hidden=True, verify=True)


def test_projected_states_are_the_plain_ones_times_the_seeded_matrix(tmp_path: Path, teacher: Path) -> None:
    teach(recipe(tmp_path, teacher, {"layers": 2, "projection": 24, "projection_seed": 3, "pooled": "last"}))
    cache = Cache.open(tmp_path / "cache", hidden=True)
    assert cache.hidden_layer.layers == (2, 3)
    matrix = projection_matrix(64, 24, 3)
    for row in cache:
        states, _ = reference(teacher, row.token_ids)
        predicting = row.predictor_index().astype(np.int64)
        for i, number in enumerate((2, 3)):
            expected = states[number][predicting].numpy() @ matrix
            bound = np.abs(expected).max(axis=1, keepdims=True) / 254 + 1e-4
            assert (np.abs(row.hidden.states.dense()[i] - expected) <= bound).all()
        last = states[4][predicting[-1]].numpy() @ matrix
        assert np.abs(row.hidden.pooled.dense() - last).max() <= np.abs(last).max() / 254 + 1e-4


@pytest.mark.parametrize(
    ("hidden", "per_position", "least_share"),
    [
        ({"layers": [1, 2, 3]}, 3 * (64 + 4), 0.85),
        ({"attention": {"layers": [2, 3], "strongest": 5}}, 2 * (2 + 5 * 5), 0.4),
    ],
)
def test_plan_prices_the_layer_and_the_real_bytes_fit(
    tmp_path: Path, teacher: Path, hidden: dict, per_position: int, least_share: float
) -> None:
    planned = plan(recipe(tmp_path, teacher, hidden))
    assert planned["hidden"]["bytes_per_position"] == per_position
    assert f"({per_position:.1f} bytes per position)" in plan_text(planned)
    assert not (tmp_path / "cache").exists()
    teach(recipe(tmp_path, teacher, hidden))
    directory = next((tmp_path / "cache/hidden").iterdir())
    records = [json.loads(path.read_text()) for path in directory.glob("part-*.json")]
    real = sum(record["stats"]["blob_bytes"] for record in records)
    assert sum(record["positions"] for record in records) == planned["hidden"]["positions"]["expected"]
    assert least_share < real / planned["hidden"]["bytes"]["at_most"] <= 1
    again = plan(recipe(tmp_path, teacher, hidden))
    assert again["hidden"]["positions"]["expected"] == 0
    assert any("measured in the cache's layer" in line for line in again["assumptions"])


def test_plan_prices_a_teacher_out_of_reach_from_what_the_recipe_assumes(tmp_path: Path, teacher: Path) -> None:
    away = recipe(tmp_path, teacher, {"layers": [6, 12, 18], "projection": 256}).model_dump(
        mode="json", exclude_none=True
    )
    away["teacher"]["model"] = str(tmp_path / "nowhere")
    unknown = plan(Recipe.model_validate(away))
    assert "hidden" not in unknown
    assert any("the hidden layer is not priced" in line for line in unknown["assumptions"])
    away["assume"] = {"teacher": {"config": {"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584}}}
    assumed = plan(Recipe.model_validate(away))
    assert assumed["hidden"]["bytes_per_position"] == 3 * (256 + 4)
    assert any("28 blocks of width 3,584, as the recipe assumes" in line for line in assumed["assumptions"])


def test_plan_counts_the_states_of_another_teacher_of_the_same_shape_as_to_do(tmp_path: Path, teacher: Path) -> None:
    moved, other = tmp_path / "moved", make_qwen3(tmp_path / "other", num_layers=3, seed=8)
    shutil.copytree(teacher, moved)
    teach(recipe(tmp_path, moved, {"layers": ["final"]}))
    planned = [plan(recipe(tmp_path, model, {"layers": ["final"]}))["hidden"] for model in (teacher, moved, other)]
    every = Cache.open(tmp_path / "cache", "top4", allow_partial=True).stats()["positions"]
    assert [figures["positions"]["expected"] for figures in planned] == [0, 0, every]
    assert teach(recipe(tmp_path, other, {"layers": ["final"]})).hidden.positions == every
    away = recipe(tmp_path, teacher, {"layers": ["final"]}).model_dump(mode="json", exclude_none=True)
    away["assume"] = {"teacher": {"config": {"model_type": "qwen3", "num_hidden_layers": 3, "hidden_size": 64}}}
    shutil.rmtree(moved)
    for name, to_do in (("gone", every), ("moved", 0)):
        away["teacher"]["model"] = str(tmp_path / name)
        found = plan(Recipe.model_validate(away))
        assert found["hidden"]["positions"]["expected"] == to_do


def test_wrong_layer_is_refused_before_anything_is_written(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(UsageError, match=r"`capture.hidden.layers` names layer 4 of a teacher that has 3"):
        teach(recipe(tmp_path, teacher, {"layers": [4]}))
    with pytest.raises(UsageError, match=r"`capture.hidden.attention.layers` asks for 9 layers"):
        teach(recipe(tmp_path, teacher, {"attention": {"layers": 9}}))
    assert not list((tmp_path / "cache").glob("*/*/part-*"))


def test_quantised_teacher_is_refused_for_hidden_states(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises((RecipeError, ValueError), match="transformers, which does not quantise"):
        recipe(tmp_path, teacher, {"layers": 1}, engine="vllm", quantization="fp8")


def test_attention_that_is_not_its_queries_and_keys_is_refused(tmp_path: Path) -> None:
    directory = make_llama(tmp_path / "llama")
    settings = recipe(tmp_path, directory, {"attention": {"layers": 1, "strongest": 2}})
    known = know_teacher(settings.teacher)
    identity = hidden_identity(known, settings.teacher, settings.capture.hidden)
    model = CausalModel.load(settings.teacher, directory)
    HiddenEngine(model, identity, 100)
    attention = model.model.base_model.layers[-1].self_attn
    plain = type(attention).forward

    def sharpened(self, *args, **kwargs):
        output, weights = plain(self, *args, **kwargs)
        return output, None if weights is None else weights**2

    attention.forward = sharpened.__get__(attention)
    with pytest.raises(EngineError, match="is not the softmax of its queries and keys"):
        HiddenEngine(model, identity, 100)


@pytest.mark.slow
def test_vllm_scores_and_transformers_captures_on_the_same_weights(tmp_path: Path, teacher: Path) -> None:
    """Targets of vLLM and a hidden layer of transformers come of one build, in one process, one engine after the
    other."""
    pytest.importorskip("vllm")
    build = recipe(tmp_path, teacher, EVERYTHING, engine="vllm")
    (tmp_path / "build.py").write_text(SCRIPT)
    (tmp_path / "recipe.json").write_text(build.model_dump_json())
    command = [sys.executable, str(tmp_path / "build.py"), str(tmp_path / "recipe.json")]
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600
    )
    result = json.loads(ran.stdout.splitlines()[-1])
    assert any("reused 0 rows, captured 7 with transformers on the same weights" in line for line in result["lines"])
    cache = Cache.open(tmp_path / "cache", hidden=True, verify=True)
    provenance = json.loads((next((tmp_path / "cache/hidden").iterdir()) / "layer.json").read_text())["provenance"]
    assert (provenance["engine"], provenance["targets_engine"]) == ("transformers", "vllm")
    states, _ = reference(teacher, cache[0].token_ids)
    expected = states[4][cache[0].predictor_index().astype(np.int64)].numpy()
    assert np.abs(cache[0].hidden.states.dense()[2] - expected).max() <= np.abs(expected).max() / 254 + 1e-3
