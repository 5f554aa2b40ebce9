"""A merged adapter says what it says on top of its model, whatever it is put on; where it cannot, it is refused."""

from __future__ import annotations

import pytest
import torch

from shared.errors import ModelError
from shared.models.weights.checkpoint import check_checkpoint
from shared.models.weights.loading import load_causal_lm
from tests.tiny_models import VOCAB_SIZE, make_llama, make_qwen3

KINDS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "embeddings in magnitude and direction": {"target_modules": ["embed_tokens"], "use_dora": True},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "both, tied": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "head as a whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 7]},
    "begun with a part of the weights": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "begun with a basis of the weights": {"target_modules": ["v_proj", "lm_head"], "init_lora_weights": "olora"},
    "rank-stabilised": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 3}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"tied": make_qwen3(root / "tied"), "untied": make_llama(root / "untied")}


def saved_adapter(model_dir, directory, **settings):
    """Save an adapter with effect, and return its directory."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(task_type="CAUSAL_LM", r=4, **settings)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    wrapped.save_pretrained(directory)
    return directory


@torch.no_grad()
def logits(model):
    ids = torch.randint(3, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=ids, use_cache=False).logits.float()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_merged_model_gives_the_logits_of_the_adapted_one_and_so_does_its_copy_on_disk(models, tmp_path, name, kind):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = saved_adapter(models[name], tmp_path / "adapter", **KINDS[kind])
    plain = AutoModelForCausalLM.from_pretrained(models[name])
    before = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, str(adapter)))
    merged = load_causal_lm(models[name], what="the teacher", trust_remote_code=False, adapter=adapter)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), expected, atol=1e-3, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, atol=1e-3, rtol=1e-3
    )


@pytest.mark.filterwarnings("ignore")
def test_adapter_of_a_layer_that_is_used_twice_is_refused(models, tmp_path):
    adapter = saved_adapter(
        models["untied"], tmp_path / "adapter", target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]
    )
    with pytest.raises(ModelError, match=r"says something else merged into LlamaForCausalLM.*merge it yourself"):
        load_causal_lm(models["untied"], what="the teacher", trust_remote_code=False, adapter=adapter)


def test_rounding_of_merged_16_bits_is_no_reason_to_refuse(models, tmp_path):
    adapter = saved_adapter(models["tied"], tmp_path / "adapter", target_modules="all-linear", use_dora=True)
    settings = {"what": "the teacher", "trust_remote_code": False, "dtype": torch.bfloat16}
    assert load_causal_lm(models["tied"], adapter=adapter, **settings).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_can_be_merged_passes_the_check_without_weights(models, tmp_path, kind):
    adapter = saved_adapter(models["untied"], tmp_path / "adapter", **KINDS[kind])
    check_checkpoint(models["untied"], what="the teacher", trust_remote_code=False, adapter=adapter)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_an_adapter_that_changes_no_weights_is_refused_as_what_it_is(models, tmp_path, kind):
    import peft
    from transformers import AutoModelForCausalLM

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(models["untied"]), config).save_pretrained(tmp_path / "a")
    said = "puts learnt vectors before a prompt .* expected one that changes weights"
    with pytest.raises(ModelError, match=said):
        check_checkpoint(models["untied"], what="the teacher", trust_remote_code=False, adapter=tmp_path / "a")
    with pytest.raises(ModelError, match=said):
        load_causal_lm(models["untied"], what="the teacher", trust_remote_code=False, adapter=tmp_path / "a")


def test_an_adapter_that_peft_cannot_merge_is_not_called_one_that_cannot_be_found(models, tmp_path):
    adapter = saved_adapter(models["untied"], tmp_path / "a", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(ModelError, match="expected an adapter that peft can merge into the weights"):
        load_causal_lm(models["untied"], what="the teacher", trust_remote_code=False, adapter=adapter)
