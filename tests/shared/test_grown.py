"""Identities may grow: a later field at its default changes no hash, elsewhere it does, and an earlier
reader says so."""

from __future__ import annotations

from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, create_model

from shared.errors import DamagedError
from shared.identity.grown import first_difference, grown, unmoved
from shared.identity.hidden_identity import HiddenIdentity
from shared.identity.identity import LayerIdentity, SequencesIdentity, difference
from shared.recipe.recipe import Generate, Sampling, Task
from tests.shared.small_cache import HYBRID, SEQUENCES, TOP

HIDDEN = HiddenIdentity(
    teacher="t",
    weights_hash="w",
    tokenizer_hash="k",
    num_layers=4,
    width=8,
    layers=(2, -1),
    pooled="mean",
    dtype="float32",
)


def later(kind: type[Any], default: Any, annotation: Any) -> type[Any]:
    """A later version's class: one more field."""
    return make_dataclass("Later", [("added", annotation, grown(default))], bases=(kind,), frozen=True, kw_only=True)


@pytest.mark.parametrize("now", [TOP, HYBRID, HIDDEN], ids=["top", "hybrid", "hidden"])
@pytest.mark.parametrize(
    ("default", "other", "annotation"), [("context", "row", str), (None, 3, int | None), (False, True, bool)]
)
def test_one_more_field_of_a_layer_changes_no_name_while_at_its_default(
    now: Any, default: Any, other: Any, annotation: Any
) -> None:
    cls = later(type(now), default, annotation)
    written = now.to_json()
    read = cls.from_json(written, "layer.json")
    assert read.added == default
    assert read.to_json() == written
    assert read.hash8 == now.hash8
    moved = cls.from_json({**written, "added": other}, "layer.json")
    assert moved.added == other
    assert moved.hash8 != now.hash8
    assert cls.from_json(moved.to_json(), "layer.json") == moved
    said = difference(read, moved)
    assert said is not None
    assert "added" in said
    with pytest.raises(DamagedError, match="added"):  # this version does not know it, and it is not at its default
        type(now).from_json(moved.to_json(), "layer.json")


def test_one_more_field_of_the_sequences_opens_old_caches() -> None:
    cls = later(SequencesIdentity, "prompt", str)
    assert cls.from_json(SEQUENCES.to_json(), "cache.json").to_json() == SEQUENCES.to_json()


def test_an_unknown_field_is_ignored_only_where_it_says_nothing() -> None:
    assert LayerIdentity.from_json({**TOP.to_json(), "added": None}, "x") == TOP
    for value in (False, 0, "", [], "x"):
        with pytest.raises(DamagedError, match="added"):
            LayerIdentity.from_json({**TOP.to_json(), "added": value}, "x")


def test_a_field_with_a_default_may_be_missing_and_others_may_not() -> None:
    document = TOP.to_json()
    short = {name: value for name, value in document.items() if name not in ("draws", "adapter", "gap_step")}
    assert LayerIdentity.from_json(short, "x") == TOP
    for name in ("vocab_size", "weights_hash", "mode", "k"):
        with pytest.raises(DamagedError, match=name):
            LayerIdentity.from_json({key: value for key, value in document.items() if key != name}, "x")


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": -1},
        {"vocab_size": 2**40},
        {"vocab_size": float("nan")},
        {"gap_step": float("inf")},
        {"k": 10**400},
        {"temperatures": [float("nan")]},
        {"temperatures": [[1.0]]},
        {"draws": -3},
        {"teacher": 7},
        {"mass": 10**400},
        {"dtype": ["x"]},
    ],
)
def test_impossible_values_are_refused_in_a_sentence(change: dict[str, Any]) -> None:
    with pytest.raises(DamagedError, match=r"layer\.json"):
        LayerIdentity.from_json({**TOP.to_json(), **change}, "layer.json")


@pytest.mark.parametrize(
    ("section", "always"),
    [(Generate(), Generate.NAMES_THE_JOB), (Sampling(kind="evaluation"), Sampling.NAMES_THE_PLAN)],
)
def test_a_later_setting_names_a_job_or_a_plan_only_where_it_is_set(section: BaseModel, always: frozenset[str]) -> None:
    before = section.model_dump(mode="json", include=set(always))
    grown_up = create_model("Later", __base__=type(section), min_p=(float, 0.0))
    kept = grown_up(**section.model_dump())
    assert kept.model_dump(mode="json", exclude=unmoved(kept, always)) == before
    moved = grown_up(**{**section.model_dump(), "min_p": 0.1})
    assert moved.model_dump(mode="json", exclude=unmoved(moved, always)) == {**before, "min_p": 0.1}


def test_every_field_of_today_is_either_of_the_first_version_or_has_a_default() -> None:
    for section, always in (
        (Generate, Generate.NAMES_THE_JOB),
        (Sampling, Sampling.NAMES_THE_PLAN),
        (Task, Task.NAMES_THE_RESULT),
    ):
        assert always <= set(section.model_fields)
        assert not [name for name, field in section.model_fields.items() if name not in always and field.is_required()]
    for identity, first in FIRST.items():
        assert {f.name for f in fields(identity) if not f.metadata.get("grown")} == set(first.split())


FIRST: dict[type[Any], str] = {
    LayerIdentity: "teacher weights_hash tokenizer_hash vocab_size mode k draws mass temperatures gap_step codec dtype"
    " head_dtype revision quantization adapter",
    HiddenIdentity: "teacher weights_hash tokenizer_hash num_layers width layers projection projection_seed"
    " projection_kind pooled attention_layers strongest codec dtype revision adapter",
    SequencesIdentity: "tokenizer_hash vocab_size template tokenizer licence answers",
}
"""Fields of the first version, which are always written; every later one is declared with `grown`."""


@pytest.mark.parametrize(
    ("old", "new", "moved", "found"),
    [
        ({"a": 1}, {"a": 1, "b": 0}, {"a": 1}, None),
        ({"a": 1}, {"a": 1, "b": 2}, {"a": 1, "b": 2}, ("b", None, 2)),
        ({"a": 1, "b": 2}, {"a": 1, "b": 0}, {"a": 1}, ("b", 2, 0)),
        ({"a": 1, "gone": 5}, {"a": 1}, {"a": 1}, ("gone", 5, None)),
        ({"a": 1, "gone": None}, {"a": 1}, {"a": 1}, None),
        ({"l": [{"n": 1}]}, {"l": [{"n": 1, "x": 0}]}, {"l": [{"n": 1}]}, None),
        ({"l": [{"n": 1}]}, {"l": [{"n": 1, "x": 3}]}, {"l": [{"n": 1, "x": 3}]}, ("l.0.x", None, 3)),
        ({"l": [1]}, {"l": [1, 2]}, {"l": [1, 2]}, ("l", [1], [1, 2])),
        ({"t": {"lr": 1}}, {"t": {"lr": 1, "x": 0}}, {}, None),
    ],
)
def test_a_setting_that_an_old_document_lacks_means_its_default(old: Any, new: Any, moved: Any, found: Any) -> None:
    assert first_difference(old, new, moved) == found


def test_layers_of_the_golden_cache_keep_their_names() -> None:
    root = Path(__file__).resolve().parents[2] / "data" / "golden" / "run-1" / "cache"
    from shared.cache.layout import list_hidden_layers, list_layers

    assert list(list_layers(root)) == ["top6-sample3-2c488e40"]
    assert list(list_hidden_layers(root)) == ["layers2-mean-d1547944"]
