"""The builder's logic, with an engine whose answers are known: what is computed, what is reused, what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest

import teacher_cache.engines as engines
from shared.cache.cache import Cache
from shared.errors import CacheError, EngineError, IdentityError, PromptError, UsageError
from shared.progress import BuildProgress
from shared.recipe.recipe import Recipe
from teacher_cache.build import SetAsideError, teach
from teacher_cache.passes.answering import BuildStoppedError
from tests.teacher_cache.fake_engine import END_ID, FakeEngine, fake_targets
from tests.tiny_models import make_qwen3
from tools import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture
def opened(monkeypatch) -> list[FakeEngine]:
    """Replace the real engines; lists those that a build opened."""
    found: list[FakeEngine] = []

    def open_engine(teacher, capture, **_):
        found.append(FakeEngine(teacher, capture))
        return found[-1]

    monkeypatch.setattr(engines, "open_engine", open_engine)
    monkeypatch.setattr(engines, "refusal", lambda teacher, capture: None)
    return found


def write_prompts(path: Path, count: int, start: int = 0, **extra) -> Path:
    rows = [
        {"prompt": f"How many apples has Anna, number {i}?", "answer": str(i), **extra}
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(tmp_path: Path, model: Path, **settings) -> Recipe:
    prompts = settings.pop("prompts", None)
    if prompts is None:
        path = tmp_path / "math.jsonl"
        if not path.exists():
            write_prompts(path, 20)
        prompts = [{"source": "math", "path": str(path), "format": "prompt_completion"}]
    teacher = {
        "model": str(model),
        "engine": "transformers",
        "dtype": "float32",
        "max_model_len": 128,
        **settings.pop("teacher", {}),
    }
    return Recipe.model_validate(
        {
            "name": "test",
            "output_dir": str(tmp_path / "run"),
            "teacher": teacher,
            "prompts": prompts,
            "generate": {"max_new_tokens": 32},
            "capture": {"k": 4},
            "cache": str(tmp_path / "cache"),
            "rows_per_part": 6,
            **settings,
        }
    )


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def test_every_prompt_is_answered_scored_and_readable(tmp_path, model, opened):
    summary = teach(recipe(tmp_path, model))
    assert (summary.generated.rows, summary.scored.rows, summary.reused_rows, summary.rows) == (20, 20, 0, 20)
    assert opened[0].closed == 1
    cache = Cache.open(tmp_path / "cache", verify=True)
    assert len(cache) == 20
    seen = {cache[i].prompt: cache[i] for i in range(20)}
    assert sorted(seen) == sorted(f"How many apples has Anna, number {i}?" for i in range(20))
    for prompt, row in seen.items():
        ((_, end),) = row.spans.tolist()
        assert row.reference == prompt.split()[-1].rstrip("?")
        assert end == len(row.token_ids)
        assert (row.token_ids[-1] == END_ID) == (row.finish_reason == "stop")
        expected = fake_targets(row.token_ids, row.spans, 4)
        np.testing.assert_array_equal(row.targets.ids, expected.ids)
        np.testing.assert_allclose(row.targets.logprobs, expected.logprobs, atol=0.04)
    seconds = json.loads((tmp_path / "run/seconds.json").read_text())
    assert set(seconds) == {"teach"}


def test_the_same_command_again_computes_nothing_and_opens_no_engine(tmp_path, model, opened):
    first = teach(recipe(tmp_path, model))
    before = tree(tmp_path)
    again = teach(recipe(tmp_path, model))
    assert len(opened) == 1
    assert (again.reused_rows, again.reused_parts, again.computed, again.rows) == (20, 4, False, first.rows)
    assert again.lines()[0] == "reused 20 rows (4 parts), generated 0, scored 0"
    assert tree(tmp_path) == before


def test_more_samples_and_more_sources_only_add_what_is_new(tmp_path, model, opened):
    teach(recipe(tmp_path, model))
    two = teach(recipe(tmp_path, model, generate={"max_new_tokens": 32, "samples_per_prompt": 2}))
    assert (two.reused_rows, two.generated.rows, two.scored.rows, two.rows) == (20, 20, 20, 40)
    more = write_prompts(tmp_path / "more.jsonl", 10, start=15)
    prompts = [
        {"source": "math", "path": str(tmp_path / "math.jsonl"), "format": "prompt_completion"},
        {"source": "extra", "path": str(more), "format": "prompt_completion"},
    ]
    summary = teach(recipe(tmp_path, model, prompts=prompts))
    assert (summary.generated.rows, summary.rows, dict(summary.duplicates)) == (5, 45, {"extra": 5})
    assert len(Cache.open(tmp_path / "cache")) == 45


def test_another_capture_only_scores_and_another_system_text_answers_anew(tmp_path, model, opened):
    teach(recipe(tmp_path, model))
    wider = teach(recipe(tmp_path, model, capture={"k": 8}))
    assert (wider.generated.rows, wider.scored.rows, wider.rows) == (0, 20, 20)
    assert len(Cache.open(tmp_path / "cache", targets="top8").layers()) == 2
    prompts = [
        {"source": "math", "path": str(tmp_path / "math.jsonl"), "format": "prompt_completion", "system": "Be brief."}
    ]
    brief = teach(recipe(tmp_path, model, prompts=prompts))
    assert (brief.generated.rows, brief.rows) == (20, 40)


def test_two_partitions_make_the_cache_of_one_process(tmp_path, model, opened):
    teach(recipe(tmp_path, model, cache=str(tmp_path / "whole")))
    first = teach(recipe(tmp_path, model), partition=(1, 2))
    assert (first.generated.rows, first.scored.rows, first.unscored_parts) == (8, 8, 0)
    teach(recipe(tmp_path, model), partition=(0, 2))
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")
    wider = {"capture": {"k": 8}}
    shares = [
        teach(recipe(tmp_path, model, prompts=[], generate=None, **wider), partition=(i, 3)).scored.rows
        for i in range(3)
    ]
    assert sum(shares) == 20


def test_seeds_differ_by_row_and_sample_and_repeat_with_the_recipe(tmp_path, model, opened):
    settings = {"generate": {"max_new_tokens": 32, "samples_per_prompt": 3}}
    teach(recipe(tmp_path, model, **settings))
    teach(recipe(tmp_path, model, cache=str(tmp_path / "other"), **settings))
    teach(recipe(tmp_path, model, cache=str(tmp_path / "third"), seed=1, **settings))
    first, second, third = (dict(engine.generated) for engine in opened)
    assert len(set(first.values())) == 60
    assert all(0 <= seed < 2**63 for seed in first.values())
    assert first == second
    assert not set(first.values()) & set(third.values())


def test_given_answers_are_taken_over_without_an_engine_for_pass_1(tmp_path, model, opened):
    path = write_prompts(tmp_path / "given.jsonl", 9, completion="It is seven.")
    path.write_text(path.read_text() + json.dumps({"prompt": "Again?", "completion": "Again."}) + "\n")
    prompts = [{"source": "given", "path": str(path), "format": "prompt_completion"}]
    summary = teach(recipe(tmp_path, model, prompts=prompts, generate=None))
    assert (summary.imported.rows, summary.generated.rows, summary.scored.rows) == (10, 0, 10)
    assert opened[0].generated == []
    assert summary.lines()[0] == "reused 0 rows (0 parts), imported 10, scored 10"
    row = Cache.open(tmp_path / "cache")[0]
    assert (row.response, row.finish_reason) == ("It is seven.", "given")


def test_rows_that_cannot_be_scored_are_set_aside_before_sequences_are_committed(tmp_path, model, opened):
    path = write_prompts(tmp_path / "math.jsonl", 20)
    path.write_text(
        path.read_text() + json.dumps({"prompt": "apples " * 200}) + "\n" + json.dumps({"prompt": "<|im_end|>"}) + "\n"
    )
    with pytest.raises(
        SetAsideError, match=r"math\.jsonl:21: the prompt has \d+ tokens.*2 of 22 rows cannot be used"
    ) as caught:
        teach(recipe(tmp_path, model))
    assert (caught.value.summary.rows, caught.value.summary.num_set_aside) == (20, 2)
    with pytest.raises(SetAsideError) as caught:  # the state of the job, not of the run
        teach(recipe(tmp_path, model))
    assert len(opened) == 1
    said = re.search(r"--max-set-aside (\S+) goes on .* `decant (cache drop .* --yes)`", str(caught.value))
    share, drop = said.groups()
    assert 2 / 22 < float(share) < 0.1
    summary = teach(recipe(tmp_path, model), max_set_aside=float(share))
    records = [json.loads(p.read_text()) for p in sorted((tmp_path / "cache/sequences").glob("*.json"))]
    reasons = [entry["reason"] for record in records for entry in record["set_aside"]]
    assert [summary.rows, len(reasons)] == [20, 2]
    assert "special token" in reasons[1]
    assert cli.main(shlex.split(drop)) == 0
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    assert teach(recipe(tmp_path, model)).generated.rows == 20


def test_answers_that_are_empty_or_outside_the_vocabulary_are_set_aside(tmp_path, model, opened, monkeypatch):
    answers = iter([([END_ID], "stop"), ([600, END_ID], "stop"), ([5] * 200, "length")])
    monkeypatch.setattr(FakeEngine, "random_answer", lambda self, rng: next(answers, ([5, END_ID], "stop")))
    summary = teach(recipe(tmp_path, model, generate={"max_new_tokens": 300}), max_set_aside=0.5)
    reasons = sorted(problem.reason.split(" tokens")[0] for problem in summary.set_aside)
    assert [summary.rows, len(reasons)] == [17, 3]
    assert reasons[1] == "the generated answer is empty"
    assert reasons[0].startswith("prompt and answer have")
    assert reasons[2] == "token id 600 lies outside the vocabulary of 512 entries"


def test_cut_answers_are_kept_and_counted_or_dropped(tmp_path, model, opened):
    kept = teach(recipe(tmp_path, model))
    assert kept.truncated > 0
    assert kept.dropped == 0
    generate = {"max_new_tokens": 32, "keep_truncated": False}
    dropped = teach(recipe(tmp_path, model, cache=str(tmp_path / "other"), generate=generate))
    assert dropped.dropped == dropped.truncated == kept.truncated
    assert dropped.rows == 20 - kept.truncated
    assert dropped.num_set_aside == 0


def test_malformed_lines_fail_the_build_above_the_threshold_and_leave_no_plan(tmp_path, model, opened):
    path = write_prompts(tmp_path / "math.jsonl", 20)
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(PromptError, match=r"math\.jsonl:21: not valid JSON"):
        teach(recipe(tmp_path, model))
    assert not list((tmp_path / "cache/jobs").rglob("*plan*"))
    summary = teach(recipe(tmp_path, model), max_set_aside=0.1)
    assert (summary.rows, summary.num_set_aside) == (20, 1)
    assert len(opened) == 1


@pytest.mark.parametrize("hits", [3, 25, 31])
def test_sigterm_leaves_whole_parts_and_the_same_command_makes_the_same_bytes(
    tmp_path, model, opened, monkeypatch, hits
):
    teach(recipe(tmp_path, model, cache=str(tmp_path / "whole")))
    count = 0

    def on_result(self):
        nonlocal count
        count += 1
        if count == hits:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(FakeEngine, "generate", _interrupted(FakeEngine.generate, on_result))
    monkeypatch.setattr(FakeEngine, "score", _interrupted(FakeEngine.score, on_result))
    with pytest.raises(BuildStoppedError, match="the same command again continues"):
        teach(recipe(tmp_path, model))
    assert signal.getsignal(signal.SIGTERM) == before
    assert opened[-1].closed == 1
    summary = teach(recipe(tmp_path, model))
    assert 0 < summary.scored.rows <= 20
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")


def _interrupted(method, on_result):
    def wrapped(self, *args):
        self.on_result = lambda: on_result(self)
        yield from method(self, *args)

    return wrapped


def test_a_failing_write_stops_the_build_at_once_with_its_cause(tmp_path, model, opened, monkeypatch):
    def full(*args, **kwargs):
        raise CacheError("the disk is full")

    monkeypatch.setattr("shared.cache.writing.cache_writer.CacheWriter.write_sequences", full)
    prompts = write_prompts(tmp_path / "many.jsonl", 400)
    with pytest.raises(CacheError, match="the disk is full"):
        teach(recipe(tmp_path, model, prompts=[{"source": "m", "path": str(prompts), "format": "prompt_completion"}]))
    assert len(opened[0].generated) < 100
    assert opened[0].closed == 1


def test_a_failure_while_rows_are_made_in_the_writers_thread_stops_the_build_with_its_cause(
    tmp_path, model, opened, monkeypatch
):
    def fail(*_, **__):
        raise RuntimeError("the tokenizer broke")

    monkeypatch.setattr("teacher_cache.prompts.sequence_maker.SequenceMaker.answered", fail)
    with pytest.raises(RuntimeError, match="the tokenizer broke"):
        teach(recipe(tmp_path, model))


def test_an_engine_that_loses_rows_is_reported(tmp_path, model, opened, monkeypatch):
    monkeypatch.setattr(FakeEngine, "generate", lambda self, requests, settings: iter([*requests][:0]))
    with pytest.raises(EngineError, match="the engine ended with 20 rows unanswered"):
        teach(recipe(tmp_path, model))


@pytest.mark.parametrize("name", ["logprobs", "label_logprobs", "tail_logmass"])
def test_a_teacher_that_computes_no_numbers_is_told_with_the_row(tmp_path, model, opened, monkeypatch, name):
    """It was told as a bug of Decant, by the writer."""
    stock = FakeEngine.score

    def score(self, requests):
        for result in stock(self, requests):
            getattr(result.targets, name)[-1] = np.nan
            yield result

    monkeypatch.setattr(FakeEngine, "score", score)
    with pytest.raises(EngineError, match=r"part-\w+-000000:\d+: the model computes NaN .* set teacher\.dtype to"):
        teach(recipe(tmp_path, model))


def test_an_engine_that_does_not_start_leaves_no_layer_behind(tmp_path, model, opened, monkeypatch):
    def fail(*_, **__):
        raise EngineError("no memory")

    teach(recipe(tmp_path, model))
    (layer,) = (tmp_path / "cache" / "targets").iterdir()
    monkeypatch.setattr("teacher_cache.engines.open_engine", fail)
    with pytest.raises(EngineError, match="no memory"):
        teach(recipe(tmp_path, model, capture={"k": 9}))
    assert list((tmp_path / "cache" / "targets").iterdir()) == [layer]
    with pytest.raises(EngineError, match="no memory"):
        teach(recipe(tmp_path, model, cache=str(tmp_path / "fresh")))
    assert list((tmp_path / "fresh" / "targets").iterdir()) == []


def test_another_tokenizer_is_refused_before_an_engine_starts(tmp_path, model, opened):
    teach(recipe(tmp_path, model))
    other = make_qwen3(tmp_path / "other")
    document = json.loads((other / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    first, second = (token for token, number in vocabulary.items() if number in (300, 301))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(IdentityError, match="tokenizer_hash is"):
        teach(recipe(tmp_path, other))
    assert len(opened) == 1


def test_another_chat_template_may_score_but_not_extend(tmp_path, model, opened):
    teach(recipe(tmp_path, model))
    base = make_qwen3(
        tmp_path / "base", seed=1, chat_template="{{ messages[0].content }}{{ messages[-1].content }}<|im_end|>"
    )
    with pytest.raises(IdentityError, match="template is"):
        teach(recipe(tmp_path, base))
    summary = teach(recipe(tmp_path, base, prompts=[], generate=None))
    assert (summary.generated.rows, summary.scored.rows) == (0, 20)


def test_a_row_longer_than_a_second_teacher_takes_is_named_before_its_engine_starts(tmp_path, model, opened):
    teach(recipe(tmp_path, model))
    with pytest.raises(
        EngineError, match=r"part-[0-9a-f]{8}-000000:\d+: the row has \d+ tokens and the teacher takes 30; raise its"
    ):
        teach(recipe(tmp_path, model, prompts=[], generate=None, capture={"k": 5}, teacher={"max_model_len": 30}))
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("settings", "partition", "reason"),
    [
        ({"prompts": [], "generate": None}, None, "no `prompts` and there is no cache"),
        ({}, (2, 2), "--partition 2/2 does not exist"),
    ],
)
def test_a_request_that_cannot_be_built_is_refused(tmp_path, model, opened, settings, partition, reason):
    with pytest.raises(UsageError, match=reason):
        teach(recipe(tmp_path, model, **settings), partition=partition)
    assert opened == []


def test_a_missing_teacher_or_prompt_file_is_one_sentence(tmp_path, model, opened):
    with pytest.raises(EngineError, match="no/such/model: neither a model directory nor a hub id"):
        teach(recipe(tmp_path, Path("no/such/model")))
    prompts = [{"source": "math", "path": str(tmp_path / "none.jsonl"), "format": "messages"}]
    with pytest.raises(PromptError, match=r"none\.jsonl: no such file"):
        teach(recipe(tmp_path, model, prompts=prompts))
    assert not (tmp_path / "cache").exists()


def test_a_build_says_once_what_an_engine_does_before_its_first_row(tmp_path, model, opened, capsys):
    teach(recipe(tmp_path, model), progress=BuildProgress())
    said = [line for line in capsys.readouterr().err.splitlines() if "starting engine" in line]
    assert len(said) == 1
    assert f"loading the weights of {model}" in said[0]
    teach(recipe(tmp_path, model), progress=BuildProgress())  # nothing to do, so none starts
    assert "starting engine" not in capsys.readouterr().err
