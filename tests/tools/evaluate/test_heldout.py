"""Held-out figures against dense float64 maths, row by row and without any batching."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from shared.cache.cache import Cache
from shared.errors import DecantError, EvaluationError
from shared.keys import is_heldout
from student_train.evaluate.heldout_rows import heldout_rows
from tests.tiny_models import make_llama, make_qwen3, spoil, training_text
from tests.tools.evaluate.heldout_cache import build_cache, dense_logprobs
from tools.evaluate.heldout.bootstrap import ratio_interval
from tools.evaluate.heldout.confidence_bins import ConfidenceBins
from tools.evaluate.heldout.heldout import evaluate_heldout
from tools.evaluate.heldout.heldout_sums import HeldoutSums, RowMeasure
from tools.evaluate.heldout.largest_divergences import MOST_PER_ROW, MOST_POSITIONS

FRACTION = 0.4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("heldout")
    teacher = make_qwen3(root / "teacher")
    students = {
        "qwen3": make_qwen3(root / "qwen3", seed=3),
        "padded": make_llama(root / "padded", seed=4, vocab_size=544),
    }
    return {"teacher": teacher, "cache": build_cache(root / "cache", teacher), "root": root, **students}


def reference(cache_dir: Path, model_dir: Path) -> dict[str, float]:
    cache = Cache.open(cache_dir)
    kl, equal, nll, in_five, sure, followed, teacher_sure, accepted = [], [], [], [], [], [], [], []
    for index in range(len(cache)):
        row = cache[index]
        if not is_heldout(row.group_key, FRACTION):
            continue
        log_q = dense_logprobs(model_dir, row.token_ids)[row.predictor_index()]
        for s, label in enumerate(row.labels()):
            ids = row.targets.ids[row.targets.offsets()[s] : row.targets.offsets()[s + 1]]
            log_p = row.targets.logprobs[row.targets.offsets()[s] : row.targets.offsets()[s + 1]].astype(np.float64)
            tail_p, tail_q = math.exp(row.targets.tail_logmass[s, 0]), 1 - np.exp(log_q[s, ids]).sum()
            kl.append(float((np.exp(log_p) * (log_p - log_q[s, ids])).sum() + tail_p * math.log(tail_p / tail_q)))
            accepted.append(float(np.minimum(np.exp(log_p), np.exp(log_q[s, ids])).sum()))
            equal.append(int(log_q[s].argmax()) == int(ids[0]))
            nll.append(-log_q[s, label])
            in_five.append(int(log_q[s].argmax()) in ids[:5].tolist())
            sure.append(float(np.exp(log_q[s].max())))
            followed.append(int(log_q[s].argmax()) == label)
            teacher_sure.append(math.exp(log_p[0]))
    calibration, agreement = binned(sure, followed), binned(teacher_sure, equal)
    error = sum(n * abs(right - confidence) for _, n, confidence, right in calibration) / len(kl)
    return {"kl_nats": np.mean(kl), "top1_agreement": np.mean(equal), "perplexity": math.exp(np.mean(nll)),
    "positions": len(kl), "acceptance_rate": np.mean(accepted),
            "top1_in_teacher_top5": np.mean(in_five), "calibration_error": error, "calibration": calibration,
            "agreement_by_teacher_confidence": agreement}  # fmt: skip


def binned(confidences: list[float], right: list[bool]) -> list[tuple[float, int, float, float]]:
    """Ten bins, those with positions: low edge, positions, mean confidence, share that was right."""
    found = []
    for low in range(10):
        inside = [
            (c, r) for c, r in zip(confidences, right, strict=True) if low / 10 <= c < (low + 1) / 10 + (low == 9)
        ]
        if inside:
            found.append(
                (low / 10, len(inside), float(np.mean([c for c, _ in inside])), float(np.mean([r for _, r in inside])))
            )
    return found


@pytest.mark.parametrize("student", ["teacher", "qwen3", "padded"])
@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_figures_equal_dense_float64_maths_however_rows_are_batched(
    world: dict[str, Path], student: str, batch_tokens: int
) -> None:
    found = evaluate_heldout(world[student], [world["cache"]], FRACTION, batch_tokens=batch_tokens)
    expected = reference(world["cache"], world[student])
    assert found["positions"] == expected["positions"] > 100
    positions, kls = zip(*found["row_kl"].values(), strict=True)
    assert (len(positions), sum(positions)) == (found["rows"], found["positions"])
    assert sum(kls) / sum(positions) == pytest.approx(found["kl_nats"])
    assert found["kl_nats"] == pytest.approx(expected["kl_nats"], rel=2e-4, abs=2e-6)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(expected["top1_agreement"])
    assert found["kl_low"] <= found["kl_nats"] <= found["kl_high"]
    assert found["top1_in_teacher_top5"] == pytest.approx(expected["top1_in_teacher_top5"])
    assert found["acceptance_rate"] == pytest.approx(expected["acceptance_rate"], rel=1e-4)
    assert found["acceptance_rate"] <= found["acceptance_rate_at_most"] <= 1
    assert found["calibration_error"] == pytest.approx(expected["calibration_error"], rel=1e-4, abs=1e-6)
    for name in ("calibration", "agreement_by_teacher_confidence"):
        bins = [(part["low"], part["positions"], part["confidence"], part["right"]) for part in found[name]]
        assert np.array(bins) == pytest.approx(np.array(expected[name]), rel=1e-4)


def test_the_teacher_measures_its_own_quantisation_and_its_own_perplexity(world: dict[str, Path]) -> None:
    found = evaluate_heldout(world["teacher"], [world["cache"]], FRACTION)
    assert 0 <= found["kl_nats"] < 1e-3
    assert found["top1_agreement"] > 0.99
    assert found["perplexity"] == pytest.approx(found["teacher_perplexity"], rel=1e-2)


def test_partings_are_the_positions_of_the_largest_divergence_with_what_each_side_says(world: dict[str, Path]) -> None:
    cache, every = Cache.open(world["cache"]), []
    for _, index in heldout_rows([cache], FRACTION, None):
        row = cache[index]
        log_q = dense_logprobs(world["qwen3"], row.token_ids)[row.predictor_index()]
        of_row = []
        for s, label in enumerate(row.labels()):
            where = slice(*row.targets.offsets()[s : s + 2])
            ids, log_p = row.targets.ids[where], row.targets.logprobs[where].astype(np.float64)
            tail_p, tail_q = math.exp(row.targets.tail_logmass[s, 0]), 1 - np.exp(log_q[s, ids]).sum()
            kl = float((np.exp(log_p) * (log_p - log_q[s, ids])).sum() + tail_p * math.log(tail_p / tail_q))
            of_row.append(
                (kl, row.source, np.exp(log_p[:5]), np.sort(np.exp(log_q[s]))[::-1][:5], math.exp(log_q[s, label]))
            )
        every += sorted(of_row, key=lambda entry: -entry[0])[:MOST_PER_ROW]
    expected = sorted(every, key=lambda entry: -entry[0])[:MOST_POSITIONS]
    found = evaluate_heldout(world["qwen3"], [world["cache"]], FRACTION, batch_tokens=128)["partings"]
    assert len(found) == len(expected) > 5
    for parting, (kl, source, teacher, student, label) in zip(found, expected, strict=True):
        assert parting["kl_nats"] == pytest.approx(kl, rel=1e-3)
        assert parting["source"] == source
        assert [p for _, p in parting["teacher"]] == pytest.approx(teacher.tolist(), rel=1e-3)
        assert [p for _, p in parting["student"]] == pytest.approx(student.tolist(), rel=1e-3)
        assert parting["token_probability"]["student"] == pytest.approx(label, rel=1e-3)
        assert any(parting["before"] + parting["token"] in text for text in training_text())


def test_sources_add_up_to_the_whole(world: dict[str, Path]) -> None:
    found = evaluate_heldout(world["qwen3"], [world["cache"]], FRACTION)
    parts = found["by_source"].values()
    assert len(parts) > 1
    assert sum(part["positions"] for part in parts) == found["positions"]
    assert sum(part["kl_nats"] * part["positions"] for part in parts) == pytest.approx(
        found["kl_nats"] * found["positions"]
    )


def test_bins_of_sources_add_up_and_perfect_confidence_has_no_calibration_error(world: dict[str, Path]) -> None:
    found = evaluate_heldout(world["qwen3"], [world["cache"]], FRACTION)
    for name in ("calibration", "agreement_by_teacher_confidence"):
        for part in found[name]:
            same = [own for source in found["by_source"].values() for own in source[name] if own["low"] == part["low"]]
            assert sum(own["positions"] for own in same) == part["positions"]
    sure = ConfidenceBins.of(
        np.array([1.0, 1.0, 0.25, 0.25, 0.25, 0.25]), np.array([True, True, True, False, False, False])
    )
    assert sure.gap() == pytest.approx(0.0)
    assert ConfidenceBins.of(np.array([1.0, 0.5]), np.array([False, False])).gap() == pytest.approx(0.75)
    assert ConfidenceBins().gap() is None


def test_the_cap_takes_a_subset_of_the_held_out_rows_whatever_the_cap(world: dict[str, Path]) -> None:
    cache = Cache.open(world["cache"])
    every = heldout_rows([cache], FRACTION, None)
    assert {row for _, row in every} == {i for i in range(len(cache)) if is_heldout(cache[i].group_key, FRACTION)}
    assert heldout_rows([cache], FRACTION, 3) == every[:3]
    capped = evaluate_heldout(world["qwen3"], [world["cache"]], FRACTION, max_rows=3)
    assert capped["rows"] == 3


def test_rows_beyond_the_models_length_are_left_out_and_counted(world: dict[str, Path]) -> None:
    cache = Cache.open(world["cache"])
    lengths = sorted(int(cache.num_tokens[row]) for _, row in heldout_rows([cache], FRACTION, None))
    short = make_qwen3(world["root"] / "short", max_position_embeddings=lengths[len(lengths) // 2])
    found = evaluate_heldout(short, [world["cache"]], FRACTION)
    assert found["rows_too_long"] == sum(length > lengths[len(lengths) // 2] for length in lengths) > 0
    assert found["rows"] + found["rows_too_long"] == len(lengths)


def test_what_cannot_be_measured_is_refused_in_a_sentence(world: dict[str, Path]) -> None:
    with pytest.raises(EvaluationError, match="no row is held out"):
        evaluate_heldout(world["qwen3"], [world["cache"]], 0.0)
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        evaluate_heldout(world["root"] / "nothing", [world["cache"]], FRACTION)
    with pytest.raises(DecantError, match="is not a cache"):
        evaluate_heldout(world["qwen3"], [world["root"]], FRACTION)
    with pytest.raises(DecantError, match="400 rows"):
        evaluate_heldout(make_llama(world["root"] / "small", vocab_size=VOCAB_TOO_SMALL), [world["cache"]], FRACTION)


VOCAB_TOO_SMALL = 400


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        counts = rng.integers(5, 50, size=60).astype(float)
        sums = counts * rng.normal(1.0, 0.5, size=60)
        low, high = ratio_interval(sums, counts, trial)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert ratio_interval(sums, counts, 1) == ratio_interval(sums, counts, 1)


def test_teacher_is_measured_in_the_type_that_its_layer_records(world: dict[str, Path], tmp_path: Path) -> None:
    """A large teacher in float32 would need twice its memory; a student stays in float32 on any layer."""
    narrow = build_cache(tmp_path / "narrow", world["teacher"], dtype="bfloat16")
    found = evaluate_heldout(world["teacher"], [narrow], FRACTION, as_captured=True)
    assert found["dtype"] == "bfloat16" and 0 < found["kl_nats"] < 0.05 and "quantization" not in found
    assert found["layer"] == Cache.open(narrow).layer_name
    assert evaluate_heldout(world["qwen3"], [narrow], FRACTION)["dtype"] == "float32"


def test_quantisation_that_only_the_engine_does_is_said(world: dict[str, Path], tmp_path: Path) -> None:
    quantised = build_cache(tmp_path / "quantised", world["teacher"], dtype="bfloat16", quantization="fp8")
    found = evaluate_heldout(world["teacher"], [quantised], FRACTION, as_captured=True)
    assert found["quantization"] == {"captured": "fp8", "measured": None}


def test_bits_per_byte_are_of_the_text_and_positions_without_a_head_count_for_them_alone():
    bins = ConfidenceBins()
    sums = HeldoutSums()
    sums.add(RowMeasure("a", 4, 2, 0.6, 1, 2, math.log(2) * 12, 3.0, bins, bins, 1.0, 1.5, text_bytes=8))
    found = sums.figures(seed=0)
    assert found["bits_per_byte"] == pytest.approx(1.5)
    assert (found["kl_nats"], found["top1_agreement"]) == (pytest.approx(0.3), 0.5)
    assert (found["positions"], found["positions_compared"]) == (4, 2)
    assert found["perplexity"] == pytest.approx(8.0)
    sums.add(RowMeasure("a", 1, 1, 0.1, 1, 1, 1.0, 1.0, bins, bins, 1.0, 1.0))
    assert sums.figures(seed=0)["bits_per_byte"] is None


def test_interval_is_that_of_the_rows_with_a_position_to_compare():
    bins, sums, with_none = ConfidenceBins(), HeldoutSums(), HeldoutSums()
    for kl_nats, compared in ((0.6, 2), (1.5, 3), (0.2, 1)):
        row = RowMeasure("a", 4, compared, kl_nats, 1, 2, 1.0, 3.0, bins, bins, 1.0, 1.5)
        sums.add(row)
        with_none.add(row)
    for _ in range(4):
        with_none.add(RowMeasure("a", 4, 0, 0.0, 0, 0, 1.0, 3.0, bins, bins, 0.0, 0.0))
    expected, found = sums.figures(seed=0), with_none.figures(seed=0)
    assert [found[key] for key in ("kl_nats", "kl_low", "kl_high")] == [
        expected[key] for key in ("kl_nats", "kl_low", "kl_high")
    ]
    assert found["kl_low"] >= 0.2
    alone = HeldoutSums()
    alone.add(RowMeasure("a", 4, 0, 0.0, 0, 0, 1.0, 3.0, bins, bins, 0.0, 0.0))
    alone.add(row)
    assert alone.figures(seed=0)["kl_low"] is None


def test_model_that_sees_what_follows_is_refused(world: dict[str, Path]) -> None:
    from transformers import BertGenerationConfig, BertGenerationDecoder

    directory = make_llama(world["root"] / "both-ways")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertGenerationConfig(vocab_size=512, **sizes)
    BertGenerationDecoder(config).save_pretrained(directory)
    with pytest.raises(EvaluationError, match="see what comes after"):
        evaluate_heldout(directory, [world["cache"]], FRACTION)


def test_model_that_computes_nan_is_refused_in_a_sentence(world: dict[str, Path]) -> None:
    """It ended in json's complaint about figures that are NaN, or in perplexities that were left out in silence."""
    directory = make_llama(world["root"] / "no-numbers")
    spoil(directory, int(Cache.open(world["cache"])[0].token_ids[0]))
    with pytest.raises(EvaluationError, match="computes NaN instead of numbers"):
        evaluate_heldout(directory, [world["cache"]], 1.0)
