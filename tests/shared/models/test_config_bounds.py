"""A config that asks for more parts than any model has is refused before a library makes them one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.errors import ModelError
from shared.models.config_file import read_config
from shared.models.files import load_config, load_tokenizer
from shared.models.weights.adapters import refuse_adapter_inside
from shared.models.weights.loading import load_causal_lm
from tests.tiny_models import make_qwen3

ENDLESS = [
    {"num_hidden_layers": 10**9},
    {"n_layer": 2**60},
    {"text_config": {"num_hidden_layers": 300_000}},
    {"vision_config": {"depth": 10**7}},
    {"num_experts": 10**6},
    {"num_hidden_layers": 1000, "n_routed_experts": 1000},
    {"num_hidden_layers": int("9" * 4000)},
]


def altered(directory: Path, change: dict) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.pop("layer_types", None)
    path.write_text(json.dumps(config | change))


@pytest.mark.parametrize("change", ENDLESS)
@pytest.mark.parametrize("load", [
    lambda place: read_config(place / "config.json"),
    lambda place: load_config(place, what="the student", trust_remote_code=False),
    lambda place: load_tokenizer(place, trust_remote_code=False),
    lambda place: load_causal_lm(place, what="the student", trust_remote_code=False),
])  # fmt: skip
def test_endless_parts_are_refused_whoever_loads(tmp_path, change, load):
    make_qwen3(tmp_path, seed=0, num_layers=1)
    altered(tmp_path, change)
    with pytest.raises(ModelError, match=r"a model has at most [\d,]+") as found:
        load(tmp_path)
    assert len(str(found.value)) < 400 and "\n" not in str(found.value)


@pytest.mark.parametrize("change", [
    {"num_hidden_layers": 61, "n_routed_experts": 384, "num_experts_per_tok": 8, "max_window_layers": 61},
    {"num_hidden_layers": 126}, {"layer_norm_eps": 1e-5, "intermediate_size": 10**6, "vocab_size": 10**6},
])  # fmt: skip
def test_the_largest_models_pass(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(change))
    assert read_config(tmp_path / "config.json") == change


def test_an_adapter_named_as_a_model_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModelError, match="holds an adapter without its model; name the model's directory"):
        read_config(tmp_path / "config.json")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="cannot be read as a model's config"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize(("said", "way_out"), [
    ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, "leave the adapter out"),
    ({"peft_type": "LORA", "r": 4}, "merge the adapter into it"),
])  # fmt: skip
def test_no_advice_is_given_that_an_adapter_of_its_kind_cannot_follow(tmp_path: Path, said, way_out) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError) as found:
        refuse_adapter_inside(tmp_path, "the student 'x'")
    assert way_out in str(found.value)
    assert ("merge" in str(found.value)) == (said["peft_type"] == "LORA")
