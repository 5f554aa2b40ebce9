"""A recipe that captured one of several layers means that one; where that is not clear the reader's own refusal stands."""

from __future__ import annotations

from dataclasses import replace

from shared.cache_writer import CacheWriter
from shared.identity import LayerIdentity, SequencesIdentity
from shared.layer_choice import layer_of_capture
from shared.recipe import Recipe

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
    return directory, [writer.layer(None, layer, {}).name for layer in layers]


def test_recipe_means_the_layer_that_it_captured(tmp_path):
    path, names = cache_with(tmp_path / "c", TOP8, replace(TOP8, k=16), replace(TOP8, temperatures=(1.0, 2.0)))
    chosen = [layer_of_capture(recipe_of(path, **capture)) for capture in ({}, {"k": 16}, {"temperatures": [2.0]})]
    assert chosen == names and len(set(names)) == 3


def test_one_layer_or_an_unclear_choice_is_left_to_the_reader(tmp_path):
    path, _ = cache_with(tmp_path / "one", replace(TOP8, k=16))
    assert layer_of_capture(recipe_of(path)) is None
    path, _ = cache_with(tmp_path / "same", TOP8, replace(TOP8, weights_hash="c" * 32))
    assert layer_of_capture(recipe_of(path)) is None
