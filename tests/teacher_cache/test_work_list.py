"""Keys, duplicates and requests of the work list."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from pydantic import create_model

from shared.cache import rows_left_out
from shared.keys import group_key
from shared.recipe.recipe import Generate, PromptSource, Recipe
from teacher_cache.prompts.formats.prompt_formats import Conversation
from teacher_cache.prompts.problems import Problems
from teacher_cache.prompts.work_list import conversation_of, list_rows, request_of, request_seed

PATH = "math.jsonl"


def source(name="math", **settings) -> PromptSource:
    return PromptSource(**{"source": name, "path": PATH, "format": "messages", **settings})


def talk(
    question: str, answer: str | None = None, line: int = 1, name="math", origin=0, reference=None
) -> Conversation:
    turns = [{"role": "user", "content": question}] + ([{"role": "assistant", "content": answer}] if answer else [])
    return Conversation(name, PATH, line, "messages", turns, None, reference, origin)


def rows(conversations, sources=None, generate=None, seed=0):
    problems = Problems()
    sources = sources or [source()]
    return list(list_rows(conversations, sources, generate, seed, problems)), problems


def keys(*args, **kwargs) -> list[bytes]:
    return [row.row_key for row in rows(*args, **kwargs)[0]]


def test_samples_of_one_prompt_share_the_group_and_nothing_else():
    found, problems = rows([talk("Two?"), talk("Three?")], generate=Generate(samples_per_prompt=3))
    assert [row.group_key for row in found] == [group_key("Two?")] * 3 + [group_key("Three?")] * 3
    assert len({row.row_key for row in found}) == 6
    assert [row.sample_index for row in found] == [0, 1, 2] * 2
    assert [row.source for row in found] == ["math"] * 6
    assert not problems.duplicates


def test_the_first_source_wins_and_each_sources_duplicates_are_counted():
    sources = [source("a"), source("b")]
    talks = [
        talk("Two?", name="a"),
        talk("Two?", name="a"),
        talk("Two?", name="b", origin=1),
        talk("New?", name="b", origin=1),
    ]
    found, problems = rows(talks, sources, Generate())
    assert [(row.source, row.prompt) for row in found] == [("a", "Two?"), ("b", "New?")]
    assert problems.duplicates == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 5}, {"stop": ("x",)}, {"max_new_tokens": 7}, {"seed": 3}],
)
def test_each_sampling_setting_makes_another_row(settings):
    assert keys([talk("Two?")], generate=Generate()) != keys([talk("Two?")], generate=Generate(**settings))


def test_a_later_sampling_setting_makes_another_row_where_it_is_set(monkeypatch):
    later = create_model("Later", __base__=Generate, min_p=(float, 0.0))
    assert keys([talk("Two?")], generate=later()) == keys([talk("Two?")], generate=Generate())
    assert keys([talk("Two?")], generate=later(min_p=0.1)) != keys([talk("Two?")], generate=Generate())
    monkeypatch.setattr(rows_left_out, "Generate", later)
    before, kept, moved = ({"generate": one.model_dump(mode="json")} for one in (Generate(), later(), later(min_p=0.1)))
    assert rows_left_out._asked(before) == rows_left_out._asked(kept) != rows_left_out._asked(moved)


def test_settings_that_do_not_change_an_answer_do_not_change_the_row():
    one = keys([talk("Two?")], generate=Generate())
    assert keys([talk("Two?", line=9, reference="2")], generate=Generate(keep_truncated=False)) == one
    assert keys([talk("Two?")], generate=Generate(samples_per_prompt=2))[:1] == one
    assert keys([talk("Two?")], generate=Generate(seed=5), seed=1) == keys(
        [talk("Two?")], generate=Generate(seed=5), seed=2
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"system": "Be brief."},
        {"template": "none"},
        {"chat_template": "{{ x }}"},
        {"chat_template_kwargs": {"a": 1}},
        {"supervise": "last"},
        {"date": "2026-01-31"},
    ],
)
@pytest.mark.parametrize("generate", [None, Generate()])
def test_another_rendering_makes_another_row_of_the_same_group(settings, generate):
    plain, rendered = (
        [row] for sources in ([source()], [source(**settings)]) for row in rows([talk("2?", "2")], sources, generate)[0]
    )
    assert plain[0].row_key != rendered[0].row_key
    assert plain[0].group_key == rendered[0].group_key


def test_row_keys_are_those_of_the_whole_prompt_whatever_the_group_rule():
    turns = [*talk("Two?", "2").messages, *talk("Three?", "3").messages]
    long = Conversation("math", PATH, 1, "messages", turns, None, None)
    for conversation in (talk("Two?  ", "2"), long):
        for generate in (None, Generate()):
            new, old = (
                next(list_rows([conversation], [source()], generate, 0, Problems(), None, rule))
                for rule in ("first question", "prompt")
            )
            assert new.row_key == old.row_key
            assert new.group_key == group_key("Two?")
            assert old.group_key == group_key(old.prompt) != new.group_key


def test_a_system_text_of_one_word_is_part_of_the_row_like_any_other():
    plain, chat, none = (keys([talk("2?", "2")], [source(system=text)]) for text in (None, "chat", "none"))
    assert len({*plain, *chat, *none}) == 3


def test_what_earlier_turns_say_beside_their_text_is_part_of_the_row():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    found = set()
    for extra in ({}, {"tool_calls": [call]}, {"train": False}, {"name": "Ben"}):
        turns = [*talk("Two?", "2").messages, *talk("Three?", "3").messages]
        turns[1] = {**turns[1], **extra}
        found |= set(keys([Conversation("math", PATH, 1, "messages", turns, None, None)]))
    assert len(found) == 4


def test_a_given_answer_is_part_of_the_row_and_its_place_is_not():
    first = keys([talk("Two?", "2")])
    assert keys([talk("Two?", "2", line=5)]) == first
    assert keys([talk("Two?", "two")]) != first
    both, problems = rows([talk("Two?", "2"), talk("Two?", "2"), talk("Two?", "two")])
    assert len(both) == 2
    assert problems.duplicates == {"math": 1}


def test_the_data_s_answer_becomes_the_reference_of_a_generated_one():
    (row,), _ = rows([talk("Two?", "2")], generate=Generate())
    assert (row.reference, json.loads(row.messages)["messages"]) == ("2", [{"role": "user", "content": "Two?"}])
    (row,), _ = rows([talk("Two?", "2", reference="II")], generate=Generate())
    assert row.reference == "II"


def test_a_row_gives_its_conversation_back():
    (row,), _ = rows([talk("Two?", "2", line=7, reference="II")])
    assert conversation_of(row) == talk("Two?", "2", line=7, reference="II")
    text = Conversation("math", PATH, 3, "text", None, "Once upon a time", None)
    (row,), _ = rows([text], [source(format="text")])
    assert (conversation_of(row), row.prompt) == (text, "Once upon a time")


def test_turns_after_the_last_answer_are_left_out():
    turns = [*talk("Two?", "2").messages, {"role": "user", "content": "And?"}]
    (row,), _ = rows([Conversation("math", PATH, 1, "messages", turns, None, None)])
    assert [row.row_key] == keys([talk("Two?", "2")])


@pytest.mark.parametrize(
    ("conversation", "generate", "reason"),
    [
        (talk("Two?"), None, "the row has no answer"),
        (
            Conversation("math", PATH, 1, "text", None, "Once", None),
            Generate(),
            "`format: text` has no prompt to answer",
        ),
        (
            Conversation("math", PATH, 1, "messages", [{"role": "assistant", "content": "2"}], None, None),
            None,
            "no user turn",
        ),
    ],
)
def test_what_cannot_be_a_row_is_set_aside(conversation, generate, reason):
    found, problems = rows([conversation], generate=generate)
    assert found == []
    assert reason in problems.listed[0].reason


@pytest.mark.slow
def test_listing_keeps_only_keys():
    def talks(count):
        return (talk("How many apples has Anna? " * 40 + str(i)) for i in range(count))

    def peak(count):
        tracemalloc.start()
        for _ in list_rows(talks(count), [source()], Generate(), 0, Problems()):
            pass
        tracemalloc.stop()
        tracemalloc.start()
        for _ in list_rows(talks(count), [source()], Generate(), 0, Problems()):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert (peak(6000) - peak(1000)) / 5000 < 200


def test_request_follows_content_and_settings_not_names(tmp_path):
    def request(file, **settings):
        recipe = Recipe.model_validate(
            {
                "name": "x",
                "output_dir": "run",
                "teacher": {"model": "m"},
                "cache": "c",
                "prompts": [{"source": "math", "path": str(file), "format": "text"}],
                **settings,
            }
        )
        return request_of(recipe, None, "hash", 128)

    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "c.jsonl").write_text('{"text": "y"}\n')
    first = request(tmp_path / "a.jsonl")
    assert first == request(tmp_path / "b.jsonl", name="other", output_dir="elsewhere")
    assert first != request(tmp_path / "c.jsonl")
    assert first != request(tmp_path / "a.jsonl", rows_per_part=7)


def test_request_seeds_use_63_bits_evenly():
    seeds = [request_seed(i.to_bytes(16, "big"), 0) for i in range(2000)]
    assert len(set(seeds)) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert all(900 < sum((seed >> bit) & 1 for seed in seeds) < 1100 for bit in range(63))


def thinking(thoughts: str, **marks) -> Conversation:
    said = {"role": "assistant", "content": "4", "reasoning_content": thoughts, **marks}
    turns = [{"role": "user", "content": "Two and two?"}, said, {"role": "user", "content": "And one?"}]
    return Conversation("math", PATH, 1, "messages", [*turns, {"role": "assistant", "content": "5"}], None, None, 0)


def test_thoughts_of_earlier_answers_that_are_trained_are_part_of_a_rows_key():
    talks = [thinking("Add."), thinking("Count."), thinking("Add.")]
    found, problems = rows(talks)
    assert len({row.row_key for row in found}) == 2
    assert problems.duplicates == {"math": 1}
    assert len(keys(talks, [source(supervise="last")])) == 1
    assert len(keys([thinking("Add.", train=False), thinking("Count.", train=False)])) == 1


def test_a_row_that_a_cache_holds_under_the_key_without_thoughts_keeps_it():
    unsaid = keys([thinking("")])[0]
    how = ([source()], None, 0, Problems())
    found = [row.row_key for row in list_rows([thinking("Add.")], *how, is_held=lambda key: key == unsaid)]
    assert found == [unsaid]
    assert keys([thinking("Add.")]) != [unsaid]
