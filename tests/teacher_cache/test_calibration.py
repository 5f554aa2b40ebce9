"""A calibration's line, its sample and its sizes, with an engine whose answers are known."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from shared.cache.cache import Cache
from shared.errors import UsageError
from teacher_cache.build import teach
from teacher_cache.calibration import calibrate, line_through, sample_conversations
from teacher_cache.passes.summary import PassFigures
from tests.teacher_cache.test_build import model, opened, recipe, write_prompts  # noqa: F401 - fixtures


def figures(tokens: int, seconds: float) -> PassFigures:
    return PassFigures(rows=1, tokens=tokens, seconds=seconds)


def test_fixed_time_and_rate_come_from_the_difference_of_two_builds():
    rate = line_through([figures(1000, 4.0), figures(5000, 6.0)])
    assert (rate.fixed_seconds, rate.tokens_per_second) == (pytest.approx(3.5), pytest.approx(2000))
    assert rate.seconds(100_000) == pytest.approx(53.5)
    assert rate.seconds(0) == 0


@pytest.mark.parametrize(
    ("first", "second"), [((1000, 1.0), (5000, 6.0)), ((1000, 4.0), (5000, 3.0)), ((10, 1.0), (10, 2.0))]
)
def test_times_that_contradict_a_fixed_part_give_the_mean_rate(first, second):
    rate = line_through([figures(*first), figures(*second)])
    assert rate.fixed_seconds == 0
    assert rate.tokens_per_second == pytest.approx((first[0] + second[0]) / (first[1] + second[1]))


def test_nothing_done_is_a_sentence():
    with pytest.raises(UsageError, match="no row of the sample could be used"):
        line_through([figures(0, 0.0), figures(0, 0.0)])


def two_sources(tmp_path: Path) -> list[dict]:
    prompts = []
    for name, count in (("a", 90), ("b", 30)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{name} asks number {i}"}) + "\n" for i in range(count)))
        prompts.append({"source": name, "path": str(path), "format": "prompt_completion"})
    return prompts


def test_a_sample_is_in_proportion_spread_out_and_always_the_same(tmp_path, model):  # noqa: F811
    whole = recipe(tmp_path, model, prompts=two_sources(tmp_path))
    rows = sample_conversations(whole, 40)
    assert Counter(row.source for row in rows) == {"a": 30, "b": 10}
    assert [row.place for row in rows] == [row.place for row in sample_conversations(whole, 40)]
    assert len({row.place for row in rows}) == 40
    elsewhere = tmp_path / "another" / "place"
    elsewhere.mkdir(parents=True)
    same = sample_conversations(recipe(elsewhere, model, prompts=two_sources(elsewhere)), 40)
    assert [(row.source, row.line) for row in same] == [(row.source, row.line) for row in rows]
    assert max(row.line for row in rows if row.source == "a") > 75
    assert {row.source for row in rows[:10]} == {"a", "b"}


def test_a_calibration_builds_its_sample_once_and_leaves_nothing(tmp_path, model, opened, monkeypatch):  # noqa: F811
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    whole = recipe(tmp_path, model, prompts=two_sources(tmp_path))
    found = calibrate(whole, 40)
    assert (found.rows, found.rows_by_source) == (40, {"a": 30, "b": 10})
    assert len({seed for _, seed in opened[0].generated}) == 40
    assert (len(opened), opened[0].closed) == (1, 1)
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "cache").exists()
    assert found.mean_support == 4
    assert found.provenance == {"engine": "fake"}
    # The means are those of the whole build, up to the sample.
    summary = teach(whole)
    assert sum(found.positions_by_source.values()) / 40 == pytest.approx(summary.positions / 120, rel=0.3)


def test_a_cache_without_prompts_is_calibrated_by_scoring_its_rows(tmp_path, model, opened):  # noqa: F811
    write_prompts(tmp_path / "math.jsonl", 20)
    teach(recipe(tmp_path, model))
    found = calibrate(recipe(tmp_path, model, prompts=[], generate=None, capture={"k": 8}), 12)
    assert (found.rows, found.generate, found.mean_support) == (12, None, 8)
    assert opened[1].generated == []
    assert list(Cache.open(tmp_path / "cache").layers()) == [Cache.open(tmp_path / "cache").layer_name]


def test_a_sample_s_rows_are_read_as_the_rows_that_they_were():
    from teacher_cache.calibration import _as_row
    from teacher_cache.prompts.formats.prompt_formats import Conversation, parse_row

    turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "7", "weight": 0, "thinking": "hm"}]
    row = {"conversations": turns, "system": "Be brief.", "tools": '[{"name": "find_disk"}]', "answer": "7"}
    messages, text, reference = parse_row(row, "sharegpt")
    sample = _as_row(Conversation("s", "f", 1, "sharegpt", messages, text, reference))
    assert parse_row(sample, "messages") == (messages, text, reference)
