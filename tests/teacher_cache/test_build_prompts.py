"""What a build says of its prompts, and when it refuses their template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.cache.cache import Cache
from shared.errors import PromptError
from shared.progress import NOWHERE, BuildProgress
from shared.recipe.recipe import Recipe
from teacher_cache import engines
from teacher_cache.build import teach
from teacher_cache.prompts.templates.chat_template import ChatTemplate
from teacher_cache.prompts.templates.spans import Template
from tests.teacher_cache.fake_engine import FakeEngine
from tests.tiny_models import CHATML, make_qwen3
from tools.plan.plan_prompts import count_prompts

CLOCK = "{{- '<|im_start|>system\\n' + strftime_now('%Y %m %d') + '<|im_end|>\\n' }}" + CHATML
ROWS = [
    {"messages": [{"role": "user", "content": f"How many, {i}?"}, {"role": "assistant", "content": f"They are {i}."}]}
    for i in range(12)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("model") / "teacher", chat_template=CLOCK)


@pytest.fixture(autouse=True)
def opened(monkeypatch) -> list[object]:
    found: list[object] = []
    monkeypatch.setattr(
        engines, "open_engine", lambda teacher, capture, **_: found.append(teacher) or FakeEngine(teacher, capture)
    )
    return found


def recipe(tmp_path: Path, model: Path, rows: list[dict], **source) -> Recipe:
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe.model_validate(
        {
            "name": "test",
            "output_dir": str(tmp_path / "run"),
            "teacher": {"model": str(model), "engine": "transformers", "max_model_len": 256},
            "prompts": [{"source": "talk", "path": str(path), "format": "messages", **source}],
            "capture": {"k": 4},
            "cache": str(tmp_path / "cache"),
            "rows_per_part": 5,
        }
    )


def test_a_template_that_reads_the_clock_is_refused_before_an_engine_starts(tmp_path, model, opened):
    undated = recipe(tmp_path, model, ROWS)
    for refuse in (teach, count_prompts):
        with pytest.raises(PromptError, match=r"source 'talk': .* writes the current date, .* `date: \d{4}-"):
            refuse(undated)
    assert opened == []


def test_a_date_of_the_recipe_is_in_every_row_and_in_its_key(tmp_path, model):
    keys = []
    for date in ("2026-01-31", "2026-02-01"):
        (tmp_path / date).mkdir()
        teach(recipe(tmp_path / date, model, ROWS, date=date))
        cache = Cache.open(tmp_path / date / "cache")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        for index in range(len(cache)):
            assert date.replace("-", " ") in tokenizer.decode(cache[index].token_ids.tolist())
        keys.append({cache[index].row_key for index in range(len(cache))})
    assert len(keys[0]) == len(keys[1]) == 12
    assert not keys[0] & keys[1]


def test_a_cache_that_was_built_by_the_clock_is_still_picked_up_when_all_its_rows_are_there(
    tmp_path, model, monkeypatch
):
    undated = recipe(tmp_path, model, ROWS)
    with monkeypatch.context() as earlier:  # as versions without `date` built
        earlier.setattr(Template, "require_date", lambda self: None)
        earlier.setattr(ChatTemplate, "text", ChatTemplate._render)
        assert teach(undated).imported.rows == 12
    summary = teach(undated)
    assert (summary.reused_rows, summary.imported.rows, summary.scored.rows) == (12, 0, 0)
    assert count_prompts(undated).sources["talk"].rows_in_cache == 12


def test_what_is_not_read_of_the_prompts_is_said_by_plan_and_build(tmp_path, model):
    noted = recipe(tmp_path, model, [{**row, "topic": "counting"} for row in ROWS], date="2026-01-31")
    note = "source talk: columns that are not read: topic"
    assert note in count_prompts(noted).assumed
    assert note in teach(noted).lines()
    assert note not in teach(noted).lines()  # nothing was read


def test_rows_with_tools_and_marks_pass_through_plan_and_cache(tmp_path, model):
    tools = [{"type": "function", "function": {"name": "find_disk", "parameters": {}}}]
    with_tools = "{%- if tools %}{{- tools | tojson }}{%- endif %}" + CHATML
    first = [{**ROWS[0]["messages"][0]}, {**ROWS[0]["messages"][1], "weight": 0}]
    rows = [{"messages": [*first, *row["messages"]], "tools": tools} for row in ROWS]
    summary = teach(recipe(tmp_path, model, rows, chat_template=with_tools, date="2026-01-31"))
    assert summary.imported.rows == 12
    cache = Cache.open(tmp_path / "cache")
    assert {len(cache[index].spans) for index in range(len(cache))} == {1}
    assert sorted(cache[index].response for index in range(len(cache))) == sorted(f"They are {i}." for i in range(12))
    assert len({key.tobytes() for key in cache.group_keys}) == 1


def test_prompts_that_change_while_they_are_listed_name_no_job(tmp_path, model):
    told = recipe(tmp_path, model, ROWS, date="2026-01-31")
    path = Path(told.prompts[0].path)

    class Edits(BuildProgress):
        def start(self, what, total, **more):
            if what == "list":
                path.write_text(json.dumps(ROWS[0]) + "\n")

    with pytest.raises(PromptError, match=r"talk\.jsonl: changed while its rows were listed; start again"):
        teach(told, progress=Edits(NOWHERE))
    assert not list((tmp_path / "cache").rglob("part-*"))
    teach(told)
    assert len(Cache.open(tmp_path / "cache")) == 1
