"""Rounds of a mixture that moves: shares hold all along, rows are drawn evenly, everything is a pure function of its
inputs.
"""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import TrainingError
from shared.recipe.recipe import Sampling, Schedule, Stage, StageTrainer
from student_train.order.evaluation_sampling import next_shares, within_bounds
from student_train.order.order import StageRows, source_pass
from student_train.order.round_order import RoundPlanner, RowStream
from student_train.order.scheduled_plan import GrowingPlan, plan_scheduled, shares_at
from student_train.order.schedules import RunSteps
from student_train.records.metrics_log import read_steps
from student_train.stage.stage_order import open_caches, plan_order
from student_train.stage.stages import run_stages

PACK = 400
LINEAR = {0: Schedule(kind="linear", start=0.7, end=0.3), 1: Schedule(kind="linear", start=0.3, end=0.7)}


def rows_of(seed, num_rows=600):
    chance = np.random.default_rng(seed)
    return chance.integers(20, 120, num_rows).astype(np.int32), (np.arange(num_rows) % 3).astype(np.int32)


def planner_of(seed, lengths, sources, codes=(0, 1), too_long="cut"):
    return RoundPlanner(StageRows(seed, lengths, sources, PACK, too_long=too_long), codes)


def plan_of(mixture, num_steps, packs_per_step, seed=0, run=None):
    lengths, sources = rows_of(seed)
    planner = planner_of(seed, lengths, sources, tuple(mixture))
    trainer = StageTrainer(max_steps=num_steps, per_device_train_batch_size=packs_per_step)
    return plan_scheduled(trainer, planner, mixture, run), lengths, sources


def tokens_by_step(plan, lengths, sources, code):
    """Return [steps] tokens of one source and of all."""
    steps = np.arange(plan.num_packs) // plan.packs_per_step
    rows = [plan.rows_of(pack) for pack in range(plan.num_packs)]
    assert all(lengths[row].sum() <= PACK for row in rows)
    mine = [int(lengths[row][sources[row] == code].sum()) for row in rows]
    return np.bincount(steps, mine), np.bincount(steps, [int(lengths[row].sum()) for row in rows])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(8, 120),
    st.integers(1, 6),
    st.sampled_from(["linear", "cosine"]),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_share_of_every_interval_follows_the_schedule(seed, num_steps, packs_per_step, kind, start, end):
    """Tokens up to any step are within a round's packs and a few rows of what the schedule asks for."""
    mixture = {0: Schedule(kind=kind, start=start, end=end), 1: Schedule(kind=kind, start=1 - start, end=1 - end)}
    plan, lengths, sources = plan_of(mixture, num_steps, packs_per_step, seed)
    mine, all_tokens = tokens_by_step(plan, lengths, sources, 0)
    wanted = np.array([shares_at(mixture, step, num_steps, None)[0] for step in range(num_steps)]) * all_tokens
    drift = np.cumsum(mine - wanted)
    longest_round = max(epoch.num_packs for epoch in plan.epochs)
    change = (
        abs(end - start) * longest_round / plan.num_packs
    )  # the share moves within a round, the round's share does not
    assert np.abs(drift).max() <= 2 * PACK + change * longest_round * PACK


def test_long_stage_is_within_two_percent_in_each_tenth():
    plan, lengths, sources = plan_of(LINEAR, 300, 2)
    mine, all_tokens = tokens_by_step(plan, lengths, sources, 1)
    for tenth in range(10):
        where = slice(30 * tenth, 30 * tenth + 30)
        wanted = np.mean([shares_at(LINEAR, step, 300, None)[1] for step in range(where.start, where.stop)])
        assert mine[where].sum() / all_tokens[where].sum() == pytest.approx(wanted, abs=0.02)
    assert plan.fill > 0.9


def test_share_that_stays_where_it_is_holds_from_the_first_steps_and_a_plain_number_over_an_epoch(recipe_of, tiny):
    """As the page on the course of a stage advises for a stage of few rows."""
    farthest = {}
    for kind, share in (("plain", 0.6), ("stays", {"kind": "linear", "start": 0.6, "end": 0.6})):
        found = []
        for seed in range(12):
            trainer = {"max_steps": 6, "pack_tokens": 192, "seed": seed}
            recipe = recipe_of(mixture={"math": share, "ops": 0.4}, trainer=trainer)
            stage, caches = recipe.stages[0], open_caches(recipe, recipe.stages[0])
            plan = plan_order(recipe, stage, caches, None)
            rows = np.concatenate([plan.rows_of(pack) for pack in range(plan.num_packs)])
            tokens = np.bincount(caches.sources[rows], caches.num_tokens[rows])
            found.append(abs(tokens[caches.source_names.index("math")] - 0.6 * tokens.sum()))
        farthest[kind] = max(found)
    assert 2 * farthest["stays"] < farthest["plain"]


def test_stepwise_share_changes_at_its_step():
    mixture = {
        0: Schedule(kind="step", values=(1.0, 0.0), at=(0.5,)),
        1: Schedule(kind="step", values=(0.0, 1.0), at=(0.5,)),
    }
    plan, lengths, sources = plan_of(mixture, 41, 3)
    mine, all_tokens = tokens_by_step(plan, lengths, sources, 0)
    assert (mine[:20] == all_tokens[:20]).all()
    assert (mine[20:] == 0).all()


def test_rows_of_a_source_are_drawn_equally_often():
    plan, _, sources = plan_of(LINEAR, 200, 2)
    counts = Counter(np.concatenate([plan.rows_of(pack) for pack in range(plan.num_packs)]).tolist())
    for code in (0, 1):
        drawn = [counts[row] for row in np.flatnonzero(sources == code)]
        assert max(drawn) > 1
        assert max(drawn) - min(drawn) <= 2, "passes follow one another, up to the rows that wait for room"
    assert not any(sources[row] == 2 for row in counts)


def test_plan_is_a_pure_function_and_depends_on_seed_and_schedule():
    plans = [plan_of(LINEAR, 40, 2)[0] for _ in range(2)]
    assert plans[0].hash == plans[1].hash
    other = {**LINEAR, 1: Schedule(kind="linear", start=0.3, end=0.8)}
    assert len({plan_of(mixture, 40, 2, seed)[0].hash for mixture in (LINEAR, other) for seed in (0, 1)}) == 4


def test_schedule_over_the_run_goes_on_where_the_stage_before_ended():
    share = {0: Schedule(kind="linear", start=0.0, end=1.0, over="run"), 1: Schedule(kind="constant", start=1.0)}
    first = shares_at(share, 0, 30, RunSteps(before=70, total=101))
    assert first[0] == pytest.approx(0.7 / 1.7)
    with pytest.raises(ValueError, match="needs the steps of all stages"):
        shares_at(share, 0, 30, None)


def test_all_shares_zero_at_some_step_and_empty_source_are_refused():
    fading = {0: Schedule(kind="step", values=(1.0, 0.0), at=(0.5,))}
    with pytest.raises(TrainingError, match="every share of the mixture is 0 at some step"):
        plan_of(fading, 20, 1)
    lengths, sources = rows_of(0)
    with pytest.raises(TrainingError, match="source 7, which has no row"):
        planner_of(0, lengths, sources, (0, 7))


@pytest.mark.parametrize("share", [0.5, {"kind": "linear", "start": 0.5, "end": 0.6}])
def test_a_source_without_rows_to_train_on_is_refused_by_its_name(recipe_of, share):
    recipe = recipe_of(mixture={"ops": share, "math": 0.5}, max_length=2, too_long="drop")
    stage = recipe.stages[0]
    with pytest.raises(TrainingError, match="the mixture asks for source 'math', which has no row to train on"):
        plan_order(recipe, stage, open_caches(recipe, stage), None)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=6), st.floats(0, 0.16), st.floats(0.51, 1))
def test_bounded_shares_sum_to_one_and_keep_their_order(values, floor, ceiling):
    shares = within_bounds({str(i): value for i, value in enumerate(values)}, floor, ceiling)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
    assert all(floor - 1e-12 <= share <= ceiling + 1e-12 for share in shares.values())
    ordered = [shares[str(i)] for i in np.argsort(values, kind="stable")]
    assert all(a <= b + 1e-9 for a, b in pairwise(ordered))
    free = [
        i
        for i, share in enumerate(shares.values())
        if floor + 1e-9 < share < ceiling - 1e-9 and values[i] > 1e-3 * max(values)
    ]
    ratios = [shares[str(i)] / values[i] for i in free]
    assert not ratios or max(ratios) == pytest.approx(min(ratios), rel=1e-6)


def test_worse_source_is_drawn_more_with_floor_ceiling_and_smoothing():
    base = {"a": 0.5, "b": 0.5}
    kl = {"a": 0.9, "b": 0.1}
    assert next_shares(base, base, kl, Sampling(kind="evaluation", smoothing=0)) == pytest.approx({"a": 0.9, "b": 0.1})
    assert next_shares(base, base, kl, Sampling(kind="evaluation", smoothing=0.5)) == pytest.approx(
        {"a": 0.7, "b": 0.3}
    )
    assert next_shares(base, base, kl, Sampling(kind="evaluation", smoothing=0, ceiling=0.8)) == pytest.approx(
        {"a": 0.8, "b": 0.2}
    )
    assert next_shares(base, base, kl, Sampling(kind="evaluation", smoothing=0, floor=0.25)) == pytest.approx(
        {"a": 0.75, "b": 0.25}
    )
    assert next_shares({"a": 0.2, "b": 0.8}, base, {"a": float("nan"), "b": 1}, Sampling(kind="evaluation")) == {
        "a": 0.2,
        "b": 0.8,
    }


def test_growing_plan_gives_each_round_its_packs_one_step_after_its_evaluation():
    lengths, sources = rows_of(3)
    planner = planner_of(3, lengths, sources)
    trainer = StageTrainer(max_steps=11, per_device_train_batch_size=2)
    plan = GrowingPlan.begun(trainer, planner, planner=planner, every_steps=4, settings="")
    with pytest.raises(AssertionError, match="read before its round is planned"):
        plan.rows_of(0)
    for shares, ends in (({0: 1.0, 1: 0.0}, 10), ({0: 0.0, 1: 1.0}, 18), ({0: 0.5, 1: 0.5}, 22)):
        plan.add_round(shares)
        plan.rows_of(ends - 1)
    assert plan.is_complete
    by_pack = [set(sources[plan.rows_of(pack)].tolist()) for pack in range(22)]
    assert by_pack[:10] == [{0}] * 10
    assert by_pack[10:18] == [{1}] * 8
    assert set().union(*by_pack[18:]) == {0, 1}


@pytest.mark.slow
def test_shares_that_a_run_saw_are_in_its_metrics(recipe_of):
    mixture = {
        "math": {"kind": "linear", "start": 0.9, "end": 0.1},
        "ops": {"kind": "linear", "start": 0.1, "end": 0.9},
    }
    recipe = recipe_of(mixture=mixture, trainer={"max_steps": 20, "per_device_train_batch_size": 2})
    run_stages(recipe)
    steps = read_steps(recipe.output_dir / "train/kd/metrics.jsonl")
    assert all(sum(step["tokens_by_source"].values()) == step["tokens"] for step in steps)
    for where, wanted in ((slice(0, 5), 0.8), (slice(15, 20), 0.2)):
        math = sum(step["tokens_by_source"]["math"] for step in steps[where])
        assert math / sum(step["tokens"] for step in steps[where]) == pytest.approx(wanted, abs=0.12)


def stage(**settings):
    return {"name": "kd", "losses": [{"name": "forward_kl"}], **settings}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mixture": {"a": 1.0, "b": 0.0}}, "always 0"),
        ({"sampling": {"kind": "evaluation"}}, "add an `evaluate` section"),
        (
            {"sampling": {"kind": "evaluation", "every_steps": 5}, "evaluate": {"every_steps": 2}},
            "a multiple of evaluate.every_steps",
        ),
        (
            {
                "sampling": {"kind": "evaluation"},
                "evaluate": {"every_steps": 2},
                "mixture": {"a": {"kind": "linear", "start": 1, "end": 2}},
            },
            "sampling moves the shares itself",
        ),
        (
            {
                "sampling": {"kind": "evaluation", "floor": 0.4},
                "evaluate": {"every_steps": 2},
                "mixture": {"a": 1, "b": 1, "c": 1},
            },
            "cannot sum to 1",
        ),
        (
            {
                "sampling": {"kind": "evaluation"},
                "evaluate": {"every_steps": 2},
                "trainer": {"dataloader_num_workers": 1},
            },
            "other processes would not see",
        ),
        (
            {"sampling": {"kind": "evaluation", "floor": 0.5, "ceiling": 0.5}, "evaluate": {"every_steps": 2}},
            "not below the ceiling",
        ),
    ],
)
def test_mixture_and_sampling_that_cannot_be_honoured_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Stage.model_validate(stage(**settings))


class WholeStream:
    """The definition of a stream, looking at every row that waits each time."""

    def __init__(self, seed, code, rows, lengths):
        self.seed, self.code, self.rows, self.lengths = seed, code, rows, lengths
        self.passes, self.waiting = 0, np.empty(0, np.int32)

    def peek(self, num_tokens):
        while self.lengths[self.waiting].sum() < num_tokens:
            self.waiting = np.append(self.waiting, source_pass(self.seed, self.code, self.passes, self.rows))
            self.passes += 1
        return self.waiting[: int(np.searchsorted(np.cumsum(self.lengths[self.waiting]), num_tokens)) + 1]

    def remove(self, places):
        self.waiting = np.delete(self.waiting, places)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 99), st.integers(1, 3000), st.lists(st.floats(0, 9000), min_size=1, max_size=12))
def test_stream_gives_the_rows_that_a_look_at_all_of_them_gives(seed, num_rows, looks):
    chance = np.random.default_rng(seed)
    lengths = chance.integers(1, 60, num_rows).astype(np.int32)
    rows = np.flatnonzero(chance.random(num_rows) < 0.7).astype(np.int32)
    rows = rows if len(rows) else np.zeros(1, np.int32)
    stream, whole = RowStream(seed, 0, rows, lengths), WholeStream(seed, 0, rows, lengths)
    for num_tokens in looks:
        found = stream.peek(num_tokens)
        np.testing.assert_array_equal(found, whole.peek(num_tokens))
        taken = np.flatnonzero(chance.random(len(found)) < 0.6)
        stream.remove(taken)
        whole.remove(taken)


def test_round_of_a_large_source_touches_only_the_rows_that_it_looks_at():
    """Many rounds over many rows would otherwise cost their product."""
    lengths = np.full(1_000_000, 50, np.int32)
    stream = RowStream(0, 0, np.arange(len(lengths), dtype=np.int32), lengths)
    stream.peek(1.0)  # draws the pass
    tracemalloc.start()
    for _ in range(20):
        stream.remove(np.arange(len(stream.peek(5_000.0))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000, "a look at every row takes 4 MB and more"
