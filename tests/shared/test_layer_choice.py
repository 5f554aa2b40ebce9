"""A recipe that captured one of several layers means that one; where that is not clear the reader's own refusal
stands."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shared.cache.layer_choice import layer_of_capture, serving_layer
from shared.cache.layout import list_layers
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter
from shared.identity.identity import LayerIdentity, SequencesIdentity
from shared.payload.narrowing import LayerView, Narrowing
from shared.recipe.recipe import Recipe

TOP8 = LayerIdentity(teacher="t", weights_hash="a" * 32, tokenizer_hash="b" * 32, vocab_size=100, mode="top", k=8)


def recipe_of(cache, **capture) -> Recipe:
    return Recipe.model_validate(
        {"name": "x", "output_dir": "r", "cache": str(cache), "teacher": {"model": "t"}, "capture": {"k": 8, **capture}}
    )


def cache_with(directory, *layers: LayerIdentity):
    identity = SequencesIdentity(
        tokenizer_hash="b" * 32, vocab_size=100, template="chat", tokenizer="t", licence=None, answers="given"
    )
    writer = CacheWriter.create_or_open(directory, identity, {"tokenizer.json": b"{}"})
    return directory, [LayerWriter.create_or_open(writer, None, layer, {}).name for layer in layers]


def test_recipe_means_the_layer_that_it_captured(tmp_path):
    path, names = cache_with(tmp_path / "c", TOP8, replace(TOP8, k=16), replace(TOP8, temperatures=(1.0, 2.0)))
    chosen = [layer_of_capture(recipe_of(path, **capture)) for capture in ({}, {"k": 16}, {"temperatures": [2.0]})]
    assert chosen == names and len(set(names)) == 3


def test_a_layer_that_holds_more_is_cut_to_the_capture(tmp_path):
    path, names = cache_with(tmp_path / "c", replace(TOP8, k=16), replace(TOP8, k=32, temperatures=(1.0, 2.0)))
    assert layer_of_capture(recipe_of(path)) == LayerView(names[0], Narrowing(8, 1.0, 1.0))
    assert layer_of_capture(recipe_of(path, temperatures=[2.0])) == LayerView(names[1], Narrowing(8, 1.0, 2.0))
    assert layer_of_capture(recipe_of(path, k=32)) == names[1]  # fewer temperatures cut nothing
    assert layer_of_capture(recipe_of(path, mass=0.9)) == LayerView(names[0], Narrowing(8, 0.9, 1.0))
    assert layer_of_capture(recipe_of(path, gap_step=0.03125)) is None


def test_a_build_is_served_by_the_same_teacher_only(tmp_path):
    path, names = cache_with(tmp_path / "c", replace(TOP8, k=16), replace(TOP8, k=12, weights_hash="c" * 32))
    layers = list_layers(path)
    assert serving_layer(layers, TOP8).full_name == names[0]
    assert serving_layer(layers, replace(TOP8, adapter="d")) is None
    assert serving_layer(layers, replace(TOP8, k=17)) is None
    assert serving_layer(layers, replace(TOP8, temperatures=(1.0, 2.0))) is None


@pytest.mark.parametrize(
    ("found", "wanted", "held"),
    [
        ({"temperatures": (1.0, 2.0)}, {}, True),
        ({}, {"k": 4}, False),  # the tail of another head has other draws
        ({}, {"draws": 2}, False),
        ({"temperatures": (1.0, 2.0), "mass": 0.9}, {"mass": 0.9}, False),  # the head was cut at temperature 2
        ({"temperatures": (1.0, 2.0, 4.0), "mass": 0.9}, {"temperatures": (1.0, 4.0), "mass": 0.9}, True),
    ],
)
def test_layers_with_draws_serve_fewer_temperatures_of_the_same_heads(tmp_path, found, wanted, held):
    hybrid = replace(TOP8, mode="top+sample", draws=4)
    path, _ = cache_with(tmp_path / "c", replace(hybrid, **found))
    assert (serving_layer(list_layers(path), replace(hybrid, **wanted)) is not None) == held


def test_no_capture_section_or_an_unclear_choice_is_left_to_the_reader(tmp_path):
    path, _ = cache_with(tmp_path / "one", replace(TOP8, k=128))
    silent = Recipe.model_validate({"name": "x", "output_dir": "r", "cache": str(path), "teacher": {"model": "t"}})
    assert layer_of_capture(silent) is None
    path, _ = cache_with(tmp_path / "same", TOP8, replace(TOP8, weights_hash="c" * 32))
    assert layer_of_capture(recipe_of(path)) is None
    assert layer_of_capture(recipe_of(path, k=4)) is None
