"""Once taken in silence: adapters on tied heads, gaps of quantised weights, files that are no part of a model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import ModelError
from shared.models.weights.checkpoint import check_checkpoint
from shared.models.weights.loading import load_causal_lm
from teacher_cache.engines.vllm.vllm_weights import fold_adapter, only_chosen, refuse_head_alone
from tests.tiny_models import make_llama, make_qwen2, make_qwen3

LAYER = "model.layers.1."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tied model, one with biases, and one with experts, as paths."""
    import transformers as t

    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = t.Qwen3MoeConfig(**sizes, **heads, num_experts=4, moe_intermediate_size=16)
    t.Qwen3MoeForCausalLM(config).save_pretrained(root / "experts")
    return {
        "tied": make_qwen3(root / "tied"),
        "biases": make_qwen2(root / "biases"),
        "experts": root / "experts",
    }


@pytest.mark.parametrize("name", ["tied", "biases"])
@pytest.mark.parametrize("part", ["lm_head", "embed_tokens"])
def test_adapter_on_one_of_head_and_embeddings_that_are_tied_changes_that_one(models, tmp_path, name, part):
    """Merged into the tensor that they share it changed both."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def plain(directory=models[name]):
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", part], init_lora_weights=False)
    get_peft_model(plain(), config).save_pretrained(tmp_path / "adapter")
    ids = torch.arange(8)[None]
    wanted = PeftModel.from_pretrained(plain(), str(tmp_path / "adapter"))(ids).logits
    (tmp_path / "folded").mkdir()
    fold_adapter(models[name], tmp_path / "adapter", tmp_path / "folded")
    folded, merged = (
        plain(tmp_path / "folded"),
        load_causal_lm(models[name], what="m", trust_remote_code=False, adapter=tmp_path / "adapter"),
    )
    for model in (folded, merged):
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)


def quantised(directory, target, change, *endings):
    """Copy a model with its matrices stored as 8-bit numbers, and what `endings` say beside them."""
    shutil.copytree(directory, target)
    weights = load_file(directory / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        weights[name] = torch.zeros_like(weights[name], dtype=torch.int8)
        weights |= {name.replace("weight", ending): torch.ones(len(weights[name])) for ending in endings}
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_quantised_checkpoint_that_is_whole_is_taken(models, tmp_path):
    for name in ("biases", "experts"):
        place = quantised(models[name], tmp_path / name, lambda weights: None, "weight_scale", "input_scale")
        check_checkpoint(place, what="the teacher", trust_remote_code=False)

    def mixed(weights):  # one part unquantised, one with scales of activations that others lack
        del weights[f"{LAYER}mlp.up_proj.weight_scale"], weights[f"{LAYER}mlp.down_proj.input_scale"]
        weights[f"{LAYER}mlp.up_proj.weight"] = weights[f"{LAYER}mlp.up_proj.weight"].float()
        del weights[f"{LAYER}mlp.up_proj.input_scale"]

    place = quantised(models["tied"], tmp_path / "mixed", mixed, "weight_scale", "input_scale")
    check_checkpoint(place, what="the teacher", trust_remote_code=False)


@pytest.mark.parametrize(
    ("name", "lacks", "said"),
    [
        ("biases", f"{LAYER}self_attn.q_proj.bias", r"1 tensor is missing \(first: {}\)"),
        ("biases", f"{LAYER}mlp.down_proj.weight_scale", r"1 tensor is missing \(first: {}\)"),
        ("experts", f"{LAYER}mlp.experts.2.up_proj.weight_zero", r"1 tensor is missing \(first: {}\)"),
        ("experts", f"{LAYER}mlp.experts.2.up_proj", r"what makes up .*experts"),
    ],
)
def test_gap_of_a_quantised_checkpoint_is_named(models, tmp_path, name, lacks, said):
    def change(weights):
        for found in [found for found in weights if found.startswith(lacks)]:
            del weights[found]

    place = quantised(models[name], tmp_path / "odd", change, "weight_scale", "weight_zero")
    with pytest.raises(ModelError, match=said.format(lacks.replace(".", r"\."))):
        check_checkpoint(place, what="the teacher", trust_remote_code=False)


def test_quantised_checkpoint_with_more_blocks_than_its_config_is_refused(models, tmp_path):
    def change(weights):
        weights |= {name.replace("layers.1", "layers.2"): weights[name].clone() for name in list(weights)}

    place = quantised(models["tied"], tmp_path / "odd", change, "weight_scale")
    with pytest.raises(ModelError, match=r"unexpected \(first: model\.layers\.2\."):
        check_checkpoint(place, what="the teacher", trust_remote_code=False)


def sharded(directory, target, change=lambda shards: None):
    """Copy a model in two shards with an index, beside which no whole file lies."""
    shutil.copytree(directory, target)
    (target / "model.safetensors").unlink()
    weights = load_file(directory / "model.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shards = [{n: t for i, (n, t) in enumerate(weights.items()) if i % 2 == odd} for odd in (0, 1)]
    where = {name: names[i] for i in (0, 1) for name in shards[i]}
    change(shards)
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, target / name, metadata={"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return target


def test_tensor_in_two_shards_is_refused(models, tmp_path):
    def twice(shards):
        name = next(iter(shards[0]))
        shards[1][name] = shards[0][name] + 1

    check_checkpoint(sharded(models["tied"], tmp_path / "whole"), what="the teacher", trust_remote_code=False)
    place = sharded(models["tied"], tmp_path / "odd", twice)
    with pytest.raises(ModelError, match=r"model-00002.* and model-00001.* both hold the tensor model\.embed_tokens"):
        check_checkpoint(place, what="the teacher", trust_remote_code=False)


def test_vllm_is_given_the_files_that_were_checked(models, tmp_path):
    def given(directory):
        links = tmp_path / f"links-{directory.name}"
        links.mkdir()
        found = only_chosen(directory, links)
        loaded = {path.name for path in found.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")}
        assert (found / "config.json").read_bytes() == (directory / "config.json").read_bytes()
        return found == directory, loaded, (found / "model.safetensors.index.json").exists()

    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert given(models["tied"]) == (True, {"model.safetensors"}, False)
    place = sharded(models["tied"], tmp_path / "shards")
    assert given(place) == (True, shards, True)
    shutil.copy(models["tied"] / "model.safetensors", place / "consolidated.safetensors")
    assert given(place.rename(tmp_path / "consolidated")) == (False, shards, True)
    place = sharded(models["tied"], tmp_path / "both")
    shutil.copy(models["tied"] / "model.safetensors", place)
    assert given(place) == (False, {"model.safetensors"}, False)
    place = tmp_path / "old"
    shutil.copytree(models["tied"], place)
    shutil.copy(models["tied"] / "model.safetensors", place / "model.old.safetensors")
    assert given(place) == (False, {"model.safetensors"}, False)


def test_tied_model_saved_as_its_head_is_refused_for_vllm(models, tmp_path):
    """transformers ties either way; vLLM answered from embeddings of zeros."""
    shutil.copytree(models["tied"], tmp_path / "head")
    weights = load_file(models["tied"] / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "head/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"holds only lm_head\.weight of them, .*; load the model with transformers"):
        refuse_head_alone(tmp_path / "head")
    load_causal_lm(tmp_path / "head", what="m", trust_remote_code=False).save_pretrained(tmp_path / "again")
    for directory in (tmp_path / "again", models["tied"], make_llama(tmp_path / "untied")):
        refuse_head_alone(directory)
