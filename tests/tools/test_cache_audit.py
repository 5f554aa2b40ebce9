"""Audits of a cache: the control is nothing, corruption is found, larger captures lose less; figures against dense
maths.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cache.cache import Cache
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter
from shared.errors import CacheError, IdentityError, UsageError
from shared.payload.codec import Codec
from shared.payload.targets import SparseTargets
from shared.recipe.sections.teacher import TransformersTeacher
from teacher_cache.engines.columns.column_layout import ColumnLayout
from teacher_cache.engines.transformers.transformers_model import CausalModel
from tests.tiny_models import VOCAB_SIZE, make_llama, make_qwen3
from tests.tools.evaluate.heldout_cache import build_cache, dense_logprobs
from tools.audit import live
from tools.audit.audit_cache import AuditSettings, audit_cache, audit_text
from tools.audit.capturing import capture_chunk, join_columns
from tools.audit.truncation import smaller_capture
from tools.cli import main
from tools.evaluate.heldout.heldout import load_model, measure_batch
from tools.report.figures import report_figures
from tools.report.run_files import read_run
from tools.report.tables import markdown

ROWS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("audit")
    teacher = make_qwen3(root / "teacher")
    cache = build_cache(root / "cache", teacher, num_rows=ROWS)
    return {"root": root, "teacher": teacher, "cache": cache, "student": make_llama(root / "student", seed=5)}


@pytest.fixture(scope="module")
def found(world: dict[str, Path]) -> dict:
    settings = AuditSettings(
        student=str(world["student"]), rows=99, ks=(4, 16, 64, VOCAB_SIZE), masses=(0.9, 1.0), temperatures=(2.0,)
    )
    return audit_cache(world["cache"], settings)


def with_layer(world: dict[str, Path], name: str, change, **identity) -> Path:
    """Copy the cache's sequences with one layer whose targets `change(row number, targets)` gives."""
    source = Cache.open(world["cache"])
    tokenizer = (source.path / "tokenizer" / "tokenizer.json").read_bytes()
    writer = CacheWriter.create_or_open(world["root"] / name, source.sequences_identity, {"tokenizer.json": tokenizer})
    rows = [source[i] for i in range(len(source))]
    writer.write_sequences("part-00000000-000000", [source.sequence(i) for i in range(len(source))], {})
    layer = LayerWriter.create_or_open(writer, None, replace(source.layer, **identity), {})  # type: ignore[type-var]
    layer.write(
        "part-00000000-000000", [row.key for row in rows], [change(i, row.targets) for i, row in enumerate(rows)], {}
    )
    return world["root"] / name


def test_the_teacher_is_faithful_to_itself(found: dict) -> None:
    faith = found["faithfulness"]
    assert found["rows"] == faith["rows"] == ROWS
    assert faith["unfaithful"] == []
    assert abs(faith["control"]["mean_kl"]) < 1e-6
    assert faith["control"]["worst_logprob"] < 1e-3
    assert faith["stored"]["mean_kl"] < 1e-3
    assert faith["stored"]["mean_kl"] == pytest.approx(faith["codec"]["mean_kl"], rel=0.05)
    for part in ("stored", "control", "codec"):
        assert faith[part]["top1_agreement"] > 0.99
    assert "faithful" in audit_text(found)
    assert "  * the layer's own k and mass, captured at T = 1, 2 as all lines are; KL" in audit_text(found)
    assert "  * the layer's own capture; KL" in audit_text(found | {"temperatures": [1.0, 2.0]})
    assert "UNFAITHFUL" not in audit_text(found)


def swapped_ids(targets: SparseTargets) -> SparseTargets:
    ids = targets.ids.reshape(targets.num_positions, -1).copy()
    ids[5, :2] = ids[5, 1::-1]
    ids[5, 0] = next(i for i in range(VOCAB_SIZE) if i not in ids[5])
    return replace(targets, ids=ids.ravel())


def moved_labels(targets: SparseTargets) -> SparseTargets:
    return replace(targets, label_logprobs=np.roll(targets.label_logprobs, 1))


def shifted_positions(targets: SparseTargets) -> SparseTargets:
    ids, logprobs = (of.reshape(targets.num_positions, -1) for of in (targets.ids, targets.logprobs))
    ids, logprobs = np.roll(ids, 1, axis=0).ravel(), np.roll(logprobs, 1, axis=0).ravel()
    return replace(targets, ids=ids, logprobs=logprobs, tail_logmass=np.roll(targets.tail_logmass, 1, axis=0))


@pytest.mark.parametrize("corrupt", [swapped_ids, moved_labels, shifted_positions])
def test_one_corrupted_row_is_found_and_no_other_blamed(world: dict[str, Path], corrupt) -> None:
    path = with_layer(world, f"cache-{corrupt.__name__}", lambda i, targets: corrupt(targets) if i == 3 else targets)
    found = audit_cache(path, AuditSettings(rows=99, ks=(4,), masses=(1.0,)))
    assert [row["row"] for row in found["faithfulness"]["unfaithful"]] == [3]
    assert "UNFAITHFUL row 3" in audit_text(found)
    assert "1 of 6 rows are not the teacher's" in audit_text(found)
    if corrupt is swapped_ids:
        assert found["faithfulness"]["unfaithful"][0]["worst_position"] == 5


@pytest.mark.slow
def test_a_wrong_tail_at_another_temperature_is_found(world: dict[str, Path]) -> None:
    def captured(number: int, _: SparseTargets, wrong: int | None = None) -> SparseTargets:
        row = Cache.open(world["cache"]).sequence(number)
        layout = ColumnLayout(8, (1.0, 3.0), 0, 1.0, VOCAB_SIZE)
        dense = torch.from_numpy(dense_logprobs(world["teacher"], row.token_ids)[row.predictor_index()])
        targets = join_columns([capture_chunk(dense, row, slice(0, len(dense)), layout)], layout)
        tails = targets.tail_logmass.copy()
        tails[2, 1] = np.log(0.05) if number == wrong else tails[2, 1]
        return replace(targets, tail_logmass=tails)

    settings = AuditSettings(rows=99, ks=(4,), masses=(1.0,))
    right = with_layer(world, "right-tail", captured, k=8, temperatures=(1.0, 3.0))
    assert audit_cache(right, settings)["faithfulness"]["unfaithful"] == []
    wrong = with_layer(world, "wrong-tail", lambda i, t: captured(i, t, wrong=1), k=8, temperatures=(1.0, 3.0))
    assert [row["row"] for row in audit_cache(wrong, settings)["faithfulness"]["unfaithful"]] == [1]


def test_larger_heads_never_lose_more_and_the_whole_vocabulary_loses_nothing(found: dict) -> None:
    for temperature in (1.0, 2.0):
        for mass in (0.9, 1.0):
            grid = [
                one
                for one in found["truncation"]
                if (one["temperature"], one["mass"], one["draws"]) == (temperature, mass, 0)
            ]
            grid.sort(key=lambda one: one["k"])
            assert [one["k"] for one in grid] == [4, 16, 64, VOCAB_SIZE]
            for smaller, larger in itertools.pairwise(grid):
                assert larger["kl_lost"] <= smaller["kl_lost"] + 1e-12
                assert larger["gradient_error"] <= smaller["gradient_error"] + 1e-12
                assert larger["bytes_per_position"] >= smaller["bytes_per_position"]
            if mass == 1.0:
                assert grid[-1]["kl_lost"] == grid[-1]["gradient_error"] == grid[-1]["mean_gradient_error"] == 0.0
                assert grid[0]["kl_lost"] > 0 and grid[0]["gradient_error"] > 0
                assert grid[-1]["mean_entries"] == VOCAB_SIZE
    whole = {one["mass"]: one["mean_entries"] for one in found["truncation"] if one["k"] == VOCAB_SIZE}
    assert whole[0.9] < whole[1.0]


@pytest.mark.slow
def test_losses_equal_plain_sums_over_the_dense_distributions(world: dict[str, Path], found: dict) -> None:
    cache = Cache.open(world["cache"])
    for temperature, k in ((1.0, 4), (2.0, 16)):
        lost = wrong = dense = 0.0
        mean_wrong, mean_dense, positions, num_bytes = np.zeros(VOCAB_SIZE), np.zeros(VOCAB_SIZE), 0, 0
        for index in range(len(cache)):
            row = cache.sequence(index)
            both = [
                dense_logprobs(world[name], row.token_ids)[row.predictor_index()] / temperature
                for name in ("teacher", "student")
            ]
            p, q = (np.exp(x - np.logaddexp.reduce(x, axis=1, keepdims=True)) for x in both)
            for p_s, q_s in zip(p, q, strict=True):
                head = np.argsort(-p_s)[:k]
                tail = np.setdiff1d(np.arange(VOCAB_SIZE), head)
                bucket = (p_s[head] * np.log(p_s[head] / q_s[head])).sum()
                bucket += p_s[tail].sum() * np.log(p_s[tail].sum() / q_s[tail].sum())
                lost += (p_s * np.log(p_s / q_s)).sum() - bucket
                rebuilt = p_s.copy()
                rebuilt[tail] = p_s[tail].sum() * q_s[tail] / q_s[tail].sum()
                wrong += np.linalg.norm(rebuilt - p_s)
                dense += np.linalg.norm(q_s - p_s)
                mean_wrong += rebuilt - p_s
                mean_dense += q_s - p_s
                positions += 1
            layout = ColumnLayout(k, (1.0, 2.0), 0, 1.0, VOCAB_SIZE)
            logprobs = torch.from_numpy(dense_logprobs(world["teacher"], row.token_ids)[row.predictor_index()])
            targets = join_columns([capture_chunk(logprobs, row, slice(0, len(logprobs)), layout)], layout)
            gap_step = cache.layer.gap_step  # type: ignore[union-attr]
            num_bytes += len(Codec(gap_step, (1.0, 2.0), 0, VOCAB_SIZE, k).encode(targets))
        (one,) = (
            d
            for d in found["truncation"]
            if (d["k"], d["draws"], d["mass"], d["temperature"]) == (k, 0, 1.0, temperature)
        )
        assert one["kl_lost"] == pytest.approx(lost / positions, rel=1e-3)
        assert one["gradient_error"] == pytest.approx(wrong / dense, rel=1e-3)
        assert one["mean_gradient_error"] == pytest.approx(
            np.linalg.norm(mean_wrong) / np.linalg.norm(mean_dense), rel=1e-3
        )
        assert one["bytes_per_position"] == pytest.approx(num_bytes / positions, rel=0.01)


def test_draws_are_wrong_at_a_position_and_right_in_the_mean(found: dict) -> None:
    (drawn,) = (d for d in found["truncation"] if d["draws"] and d["temperature"] == 1.0)
    assert (drawn["k"], drawn["draws"], drawn["kl_lost"]) == (8, 4, None)
    assert drawn["mean_gradient_error"] < 0.5 * drawn["gradient_error"]


def test_kl_from_the_cache_equals_kl_with_the_teacher_live_within_what_truncation_may_lose(
    world: dict[str, Path],
) -> None:
    """Full KL - cached KL lies between 0 and p_T log(max over the tail of (p / p_T) / (q / q_T)), up to the codec's
    error.
    """
    cache = Cache.open(world["cache"])
    student = load_model(str(world["student"]), None, "float32", False)
    total_gap = 0.0
    for index in range(len(cache)):
        row = cache[index]
        cached = measure_batch(student, VOCAB_SIZE, [row])[0].kl_nats
        p, q = (
            np.exp(dense_logprobs(world[name], row.token_ids)[row.predictor_index()]) for name in ("teacher", "student")
        )
        live, bound = 0.0, 0.0
        for s, (p_s, q_s) in enumerate(zip(p, q, strict=True)):
            live += (p_s * np.log(p_s / q_s)).sum()
            tail = np.setdiff1d(
                np.arange(VOCAB_SIZE), row.targets.ids[row.targets.offsets()[s] : row.targets.offsets()[s + 1]]
            )
            p_t, q_t = p_s[tail].sum(), q_s[tail].sum()
            bound += p_t * np.log((p_s[tail] / p_t / (q_s[tail] / q_t)).max())
        codec_error = 0.01 * len(p)
        assert -codec_error <= live - cached <= bound + codec_error
        total_gap += live - cached
    assert total_gap > 0


def test_without_a_student_the_mean_distribution_completes_tails(world: dict[str, Path]) -> None:
    found = audit_cache(world["cache"], AuditSettings(rows=3, ks=(8,), masses=(1.0,)))
    assert found["completion"] == "mean of the teacher's distributions"
    assert found["rows"] == 3
    assert all(np.isfinite(one["gradient_error"]) and one["gradient_error"] > 0 for one in found["truncation"])
    assert audit_cache(world["cache"], AuditSettings(rows=3, ks=(8,), masses=(1.0,))) == found
    assert sum(one["own"] for one in found["truncation"]) == 1
    assert found["smaller_capture"] is None  # the mean gradient of that q is zero, so nothing is relative to it
    assert {one["mean_gradient_error"] for one in found["truncation"]} == {None}
    assert all(line.endswith(" –") for line in audit_text(found).splitlines() if line.lstrip("* ")[:2] == "8 ")


def test_a_smaller_capture_is_named_only_where_it_is_no_worse() -> None:
    def one(k: int, error: float, size: float, own: bool = False) -> dict:
        return {
            "k": k,
            "draws": 0,
            "mass": 1.0,
            "temperature": 1.0,
            "mean_gradient_error": error,
            "bytes_per_position": size,
            "own": own,
        }

    own = one(64, 0.01, 100.0, own=True)
    assert smaller_capture([own, one(8, 0.02, 20.0), one(128, 0.001, 200.0)]) is None
    assert "k 32, 0 draws" in str(smaller_capture([own, one(8, 0.02, 20.0), one(32, 0.01, 50.0)]))


def test_the_recorded_teacher_alone_is_accepted(world: dict[str, Path]) -> None:
    other = make_qwen3(world["root"] / "other", seed=8)
    with pytest.raises(IdentityError, match=r"the layer was captured with .* --teacher DIR"):
        audit_cache(world["cache"], AuditSettings(teacher=str(other)))
    with pytest.raises(UsageError, match=r"had no adapter, and --adapter or the recipe names .* leave it out"):
        audit_cache(world["cache"], AuditSettings(adapter=str(other)))
    quantised = with_layer(world, "quantised", lambda _, targets: targets, quantization="fp8")
    with pytest.raises(IdentityError, match="quantised with fp8"):
        audit_cache(quantised, AuditSettings())
    with pytest.raises(IdentityError, match="400 entries"):
        audit_cache(world["cache"], AuditSettings(student=str(make_llama(world["root"] / "small", vocab_size=400))))
    short = make_llama(world["root"] / "short", max_position_embeddings=4)
    with pytest.raises(CacheError, match="can be read by the models"):
        audit_cache(world["cache"], AuditSettings(student=str(short)))


def test_the_command_prints_tables_or_json_and_keeps_the_audit_in_the_recipes_run(
    world: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = world["root"] / "run"
    recipe = {
        "name": "x",
        "output_dir": str(run),
        "cache": str(world["cache"]),
        "teacher": {"model": str(world["teacher"])},
    }
    path = world["root"] / "recipe.yaml"
    run.mkdir()
    path.write_text(json.dumps({**recipe, "student": {"model": str(world["student"])}}))
    options = ["--rows", "2", "--k", "4,16", "--mass", "1", "--temperatures", "2"]
    assert main(["cache", "audit", str(world["cache"]), "--recipe", str(path), *options]) == 0
    text = capsys.readouterr().out
    assert f"tails completed by: {world['student']}" in text
    kept = json.loads((run / "audit.json").read_text())
    assert [(one["k"], one["temperature"]) for one in kept["truncation"]] == [
        (k, t) for k in (16, 4, 8) for t in (1.0, 2.0)
    ]
    (run / "recipe.yaml").write_text(path.read_text())
    report = report_figures([read_run(run)])
    assert report["audit"] == kept
    assert "| stored against live |" in markdown(report)
    assert r"| 16 \* | 0 | 1 | 1 |" in markdown(report)
    bad = with_layer(world, "cache-bad", lambda i, targets: moved_labels(targets))
    assert main(["cache", "audit", str(bad), "--rows", "1", "--k", "4", "--mass", "1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["faithfulness"]["unfaithful"]
    for option in (["--k", "0"], ["--k", "1.5"], ["--mass", "2"], ["--mass", "x"], ["--temperatures", "0"]):
        assert main(["cache", "audit", str(world["cache"]), *option]) == 2
        assert f"{option[0]} {option[1]}: expected" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["cache", "audit", str(world["cache"]), "--rows", "0"])


def test_a_pass_that_waits_for_its_reader_leaves_gradients_on_elsewhere(world: dict[str, Path]) -> None:
    recorded = TransformersTeacher.model_validate(
        {"model": str(world["teacher"]), "engine": "transformers", "dtype": "float32"}
    )
    model = CausalModel.load(recorded, world["teacher"])
    row = Cache.open(world["cache"]).sequence(0)
    passing = live.dense_logprobs(model, row, step=1)
    next(passing)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    passing.close()
