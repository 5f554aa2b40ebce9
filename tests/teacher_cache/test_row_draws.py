"""Rows with equal contexts have draws of their own; a layer that was begun with shared ones is continued with shared
ones.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.cache.cache import Cache
from shared.cache.layout import list_layers
from shared.cache.reading.verify import verify_cache
from shared.recipe.recipe import Recipe
from teacher_cache import build
from teacher_cache.build import teach
from tests.tiny_models import make_qwen3

DRAWS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("teacher"), num_layers=1)


def recipe(tmp_path: Path, model: Path, texts: list[str], capture: dict) -> Recipe:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    teacher = {"model": str(model), "engine": "transformers", "dtype": "float32", "max_model_len": 128}
    return Recipe.model_validate(
        {
            "name": "t",
            "output_dir": str(tmp_path / "run"),
            "teacher": teacher,
            "prompts": [{"source": "a", "path": str(path), "format": "text"}],
            "capture": capture,
            "cache": str(tmp_path / "cache"),
        }
    )


def first_draws(cache_dir: Path) -> list[tuple[tuple[int, ...], ...]]:
    """Return (ids, multiplicities) of every row's first position."""
    cache = Cache.open(cache_dir)
    found = []
    for i in range(len(cache)):
        (draws,) = cache[i].targets.draws
        count = int(draws.counts[0])
        found.append((tuple(draws.ids[:count].tolist()), tuple(draws.multiplicities[:count].tolist())))
    return found


TEXTS = [f"Number {i} has {i % 7} apples." for i in range(240)]


@pytest.mark.parametrize(
    "capture", [{"mode": "sample", "draws": DRAWS}, {"mode": "top+sample", "k": 2, "draws": DRAWS}]
)
def test_first_positions_of_texts_with_one_beginning_average_out_to_the_teacher(tmp_path, model, capture):
    """Pooled over 240 rows each frequent token's share is within 5 standard deviations of the teacher's own."""
    import torch
    from transformers import AutoModelForCausalLM

    teach(recipe(tmp_path, model, TEXTS, capture))
    found = first_draws(tmp_path / "cache")
    assert len(set(found)) > 200
    row = Cache.open(tmp_path / "cache")[0]
    with torch.no_grad():
        teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        p = teacher(torch.tensor([[int(row.token_ids[0])]])).logits[0, 0].softmax(-1).numpy()
    p[row.targets.ids[: row.targets.counts[0]]] = 0.0
    p /= p.sum()
    counts = np.zeros(len(p))
    for ids, multiplicities in found:
        np.add.at(counts, list(ids), multiplicities)
    total = DRAWS * len(found)
    often = total * p > 5
    deviations = (counts - total * p)[often] / np.sqrt(total * p * (1 - p))[often]
    assert counts[p == 0].sum() == 0
    assert often.sum() > 10
    assert np.abs(deviations).max() < 5


def test_a_layer_begun_with_the_older_rule_keeps_it_and_serves_the_same_recipe(tmp_path, model, monkeypatch):
    work = recipe(tmp_path, model, TEXTS[:20], {"mode": "sample", "draws": DRAWS})
    own = build.layer_identity
    with monkeypatch.context() as patched:
        patched.setattr(build, "layer_identity", lambda *args: replace(own(*args), draw_key="context"))
        teach(work)
    assert len(set(first_draws(tmp_path / "cache"))) == 1
    (layer,) = list_layers(tmp_path / "cache").values()
    assert "draw_key" not in json.loads((layer.directory / "layer.json").read_text())["identity"]
    summary = teach(recipe(tmp_path, model, TEXTS[:30], {"mode": "sample", "draws": DRAWS}))
    assert summary.scored.rows == 10
    assert "equal contexts share draws" in str(summary.reuse)
    assert len(list_layers(tmp_path / "cache")) == 1
    assert len(set(first_draws(tmp_path / "cache"))) == 1
    assert list(verify_cache(tmp_path / "cache")) == []
