"""Distances between teachers from sparse heads, against brute force over dense distributions."""

from __future__ import annotations

import numpy as np
import pytest

from shared.payload.targets import SparseTargets
from tools.evaluate.results.teacher_distances import far_teachers, position_distances, top_tokens
from tools.report.numbers import NONE
from tools.report.teacher_tables import teachers_apart_table, teachers_table


def heads(dense: np.ndarray, counts: list[int]) -> SparseTargets:
    """The `counts` [S] most likely tokens of dense distributions [S, V], and the tail."""
    order = [np.argsort(-row, kind="stable")[:n] for row, n in zip(dense, counts, strict=True)]
    tails = [max(1.0 - row[ids].sum(), 0.0) for row, ids in zip(dense, order, strict=True)]
    with np.errstate(divide="ignore"):
        tail_logmass = np.log(np.array(tails, np.float32))[:, None]
    logprobs = np.concatenate([np.log(row[ids]) for row, ids in zip(dense, order, strict=True)]).astype(np.float32)
    ids = np.concatenate(order).astype(np.int32)
    return SparseTargets(np.array(counts, np.int32), ids, logprobs, np.zeros(len(dense), np.float32), tail_logmass)


def brute_force(p, q, mine: list[int], theirs: list[int]) -> float:
    """The least divergence of whatever has these heads, by a search over what is not known."""
    common, own, other = (
        sorted(ids) for ids in (set(mine) & set(theirs), set(mine) - set(theirs), set(theirs) - set(mine))
    )
    tails = [max(1.0 - dense[head].sum(), 0.0) for dense, head in ((p, mine), (q, theirs))]
    shares = np.linspace(0.0, 1.0, 1001)

    def term(a, b):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(a > 0, a * np.log(a / b), 0.0)

    given, taken = (
        tails[0] * shares[:, None] if other else np.zeros((1, 1)),
        tails[1] * shares[None] if own else np.zeros((1, 1)),
    )
    values = term(p[own].sum(), taken) + term(given, q[other].sum()) + term(tails[0] - given, tails[1] - taken)
    return float(term(p[common], q[common]).sum() + np.nanmin(values))


def test_distance_is_the_least_divergence_that_fits_both_heads():
    generator = np.random.default_rng(0)
    p, q = (generator.dirichlet(np.full(11, 0.4), 6) for _ in range(2))
    counts = [[3, 0, 5, 8, 1, 4], [4, 6, 0, 7, 2, 4]]
    mine, theirs = heads(p, counts[0]), heads(q, counts[1])
    found = position_distances(mine, theirs)
    for s in range(6):
        own, other = (np.argsort(-dense[s], kind="stable").tolist() for dense in (p, q))
        expected = brute_force(p[s], q[s], own[: counts[0][s]], other[: counts[1][s]])
        assert found[s] == pytest.approx(expected, abs=1e-4)
        assert -1e-6 <= found[s] <= float((p[s] * np.log(p[s] / q[s])).sum()) + 1e-6  # never above the full divergence
    best = [-1 if n == 0 else int(row.argmax()) for row, n in zip(p, counts[0], strict=True)]
    assert top_tokens(mine).tolist() == best
    np.testing.assert_allclose(position_distances(mine, mine), 0.0, atol=1e-6)


def test_teachers_that_are_sure_of_different_tokens_are_far_apart():
    p, q = np.full((1, 9), 0.001), np.full((1, 9), 0.001)
    p[0, 3], q[0, 5] = 0.992, 0.992
    full = float((p * np.log(p / q)).sum())
    assert full > 6.5
    assert position_distances(heads(p, [1]), heads(q, [1]))[0] == pytest.approx(
        0.992 * np.log(0.992 / 0.008) + 0.008 * np.log(0.008 / 0.992), abs=1e-4
    )


def test_whole_vocabularies_give_the_full_divergence():
    generator = np.random.default_rng(1)
    p, q = (generator.dirichlet(np.full(7, 1.0), 3) for _ in range(2))
    expected = (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(position_distances(heads(p, [7] * 3), heads(q, [7] * 3)), expected, atol=1e-5)


def test_a_teacher_far_from_all_others_is_named():
    near = {("a", "b"): 0.1, ("b", "a"): 0.1, ("a", "c"): 2.0, ("c", "a"): 2.0, ("b", "c"): 2.1, ("c", "b"): 2.2}
    assert far_teachers(near, {"a": 1.0, "b": 1.0, "c": 1.0}) == [
        "c is far from all other teachers: 2.0000 nats from the nearest, and the untrained student is nearer (1.0000)"
    ]
    (sentence,) = far_teachers(near, {})
    assert sentence.startswith("c is far")
    assert far_teachers({("a", "b"): 0.1, ("b", "a"): 0.3}, {"a": 0.2, "b": 0.4}) == []


def test_report_shows_models_and_teachers_and_warns():
    layers = {"math": {"kl_nats": 0.5}, "code": {"kl_nats": 0.25}}
    pairs = [{"of": "math", "to": "code", "kl_nats": 0.75}, {"of": "code", "to": "math", "kl_nats": 0.125}]
    report = {
        "models": {"base": {"heldout": {"by_layer": layers}}, "kd": {"heldout": None}},
        "distances": {"pairs": pairs, "without_head": ["drawn"]},
    }
    models, apart = teachers_table(report), teachers_apart_table(report)
    assert (models.header, models.rows) == (("model", "math", "code"), [["base", "0.5000", "0.2500"]])
    assert apart.header == ("teacher", "math", "code", "student's start")
    assert apart.rows == [["math", NONE, "0.7500", "0.5000"], ["code", "0.1250", NONE, "0.2500"]]
    assert "Warning: math is far from all other teachers: 0.7500 nats" in apart.legend
    assert "drawn holds drawn tokens alone, or no tail" in apart.legend
    assert teachers_apart_table({"models": {}}).rows == teachers_table({"models": {}}).rows == []
