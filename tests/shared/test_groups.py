"""Questions are found among the rows of a cache by the rule that the cache was built with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shared.cache.cache import Cache
from shared.cache.groups import question_key, questions_among
from shared.cache.writing.cache_writer import CacheWriter
from shared.errors import DamagedError
from shared.identity.identity import SequencesIdentity
from shared.parts.sequences import make_row
from teacher_cache.prompts.formats.prompt_formats import group_text

IDENTITY = SequencesIdentity(tokenizer_hash="t", vocab_size=16)
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two  and two?\n"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And three?"},
]


def cache_of(path: Path, rule: str, *conversations) -> Cache:
    rows = [
        make_row(
            row_key=question_key(f"row {number}", "prompt"),
            group_key=question_key(group_text(turns, None, rule), "prompt"),
            source="s",
            prompt="",
            response="",
            reference=None,
            token_ids=[1, 2],
            spans=[(1, 2)],
            finish_reason="given",
        )
        for number, turns in enumerate(conversations)
    ]
    CacheWriter.create_or_open(path, replace(IDENTITY, groups=rule), {}).write_sequences(
        "part-00000000-000000", rows, {}
    )
    return Cache.open_sequences(path)


def test_questions_of_a_task_are_found_by_their_text_alone(tmp_path):
    new = cache_of(tmp_path / "new", "first question", DIALOGUE, [{"role": "user", "content": "Seven?"}])
    old = cache_of(tmp_path / "old", "prompt", DIALOGUE, [{"role": "user", "content": "Eight?"}])
    asked = ["Two and two?", "And three?", " Seven? ", "Seven", "Eight?", "Eight? "]
    assert questions_among(asked, [new]) == [True, False, True, False, False, False]
    assert questions_among(asked, [old]) == [False, False, False, False, True, False]
    assert questions_among(asked, [new, old]) == [True, False, True, False, True, False]
    assert questions_among([], [new]) == []


def test_a_rule_is_written_only_where_an_older_cache_has_another():
    assert "groups" not in IDENTITY.to_json()
    assert replace(IDENTITY, groups="first question").to_json()["groups"] == "first question"
    with pytest.raises(DamagedError, match="groups"):
        SequencesIdentity.from_json({**IDENTITY.to_json(), "groups": "by chance"}, "cache.json")
