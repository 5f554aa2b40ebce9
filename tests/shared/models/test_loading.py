"""A model or an adapter that is not all there is refused by name, by what loads it and by what only looks at names."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import EngineError, EvaluationError, ModelError, TrainingError
from shared.models.files import load_config, load_tokenizer
from shared.models.weights.checkpoint import check_checkpoint
from shared.models.weights.loading import load_causal_lm
from tests.conftest import ROOT
from tests.tiny_models import make_llama, make_qwen3

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
WIDTHS = ("vision_output_dim", "projector_input_dim", "projector_output_dim")
LAST_LAYER = "model.layers.1."


def load(directory):
    return load_causal_lm(directory, what="the student", trust_remote_code=False)


def look(directory):
    check_checkpoint(directory, what="the student", trust_remote_code=False)


WAYS = pytest.mark.parametrize("way", [load, look])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tied and untied models, mixtures of experts and the text model of a larger one, as paths."""
    import transformers as t

    root = tmp_path_factory.mktemp("models")
    made = {
        "tied": make_qwen3(root / "tied"),
        "untied": make_llama(root / "untied"),
    }
    llama4 = t.Llama4Config(
        text_config={**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2},
        vision_config={**VISION, "intermediate_size": 128, **dict.fromkeys(WIDTHS, 32)},
    )
    for name, model_class, config in (
        ("experts", t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig(**TEXT, num_experts=4, moe_intermediate_size=16)),
        ("mixtral", t.MixtralForCausalLM, t.MixtralConfig(**TEXT, num_local_experts=2)),
        ("larger", t.Llama4ForConditionalGeneration, llama4),
    ):
        model_class(config).save_pretrained(root / name)
        made[name] = root / name
    return made


def altered(directory: Path, target: Path, change) -> Path:
    """Copy a model with its tensors changed."""
    shutil.copytree(directory, target)
    weights = load_file(directory / "model.safetensors")
    save_file(change(weights), target / "model.safetensors", metadata={"format": "pt"})
    return target


def without(part):
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def renamed(old, new):
    return lambda weights: {name.replace(old, new): tensor for name, tensor in weights.items()}


def prefixed(start):
    return lambda weights: {start + name: tensor for name, tensor in weights.items()}


def plus(name):
    return lambda weights: {**weights, name: torch.ones(2)}


@pytest.mark.parametrize(("kind", "tied"), [("youtu", True), ("youtu", False), ("zaya", True)])
def test_what_a_class_writes_over_while_it_loads_is_as_stored(tmp_path, kind, tied):
    """Youtu's class puts zeros in the row of the padding token, Zaya's -1 in its routers' last bias."""
    import transformers as t

    narrow = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    more = {"num_experts": 2, "moe_intermediate_size": 16, "router_hidden_size": 8} if kind == "zaya" else narrow
    sizes = {**TEXT, "head_dim": 8, "num_key_value_heads": 2, "pad_token_id": 5, "tie_word_embeddings": tied}
    model = t.AutoModelForCausalLM.from_config(t.CONFIG_MAPPING[kind](**(sizes | more)))
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand_like(tensor))
    model.save_pretrained(tmp_path)
    stored, plain = model.state_dict(), t.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in stored.items())
    found = load(tmp_path).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in stored.items())


@pytest.mark.parametrize("name", ["tied", "untied", "experts", "mixtral", "larger"])
def test_whole_model_is_loaded(models, name):
    """Nothing is refused, and what was loaded sums to what the file holds, whatever names it has there."""
    look(models[name])
    tensors = load_file(models[name] / "model.safetensors").items()
    of_text = [tensor for name, tensor in tensors if not name.startswith(("vision_model", "multi_modal_projector"))]
    loaded, stored = (
        sum(float(tensor.detach().double().abs().sum()) for tensor in some)
        for some in (load(models[name]).parameters(), of_text)
    )
    assert loaded == pytest.approx(stored, rel=1e-12)


@WAYS
def test_model_in_shards_with_old_buffers_is_loaded(models, tmp_path, way):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(models["untied"]).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    way(tmp_path / "shards")
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    way(altered(models["tied"], tmp_path / "old", lambda weights: {**weights, **buffers}))


@WAYS
def test_pickled_weights_are_read_as_weights_only(models, tmp_path, way):
    shutil.copytree(models["untied"], tmp_path / "bin")
    weights = load_file(tmp_path / "bin/model.safetensors")
    (tmp_path / "bin/model.safetensors").unlink()
    torch.save(weights, tmp_path / "bin/pytorch_model.bin")
    way(tmp_path / "bin")
    weights.pop("lm_head.weight")
    torch.save(weights, tmp_path / "bin/pytorch_model.bin")
    with pytest.raises(ModelError, match=r"1 tensor is missing \(first: lm_head\.weight\)"):
        way(tmp_path / "bin")


@WAYS
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("tied", without("layers.1.mlp.down_proj"), r"Qwen3ForCausalLM: 1 tensor is missing .*1\.mlp\.down_proj"),
        ("untied", without(LAST_LAYER), r"9 tensors are missing \(first: model\.layers\.1\.input_layernorm"),
        ("untied", without("lm_head"), r"1 tensor is missing \(first: lm_head\.weight\)"),
        ("untied", prefixed("_orig_mod."), r"first: _orig_mod\.lm_head.* prefix '_orig_mod\.'"),
        ("untied", prefixed("base.model."), r"are missing .* without the prefix 'base\.model\.'"),
        ("untied", plus("model.layers.2.mlp.up_proj.weight"), r"1 tensor is unexpected \(first: model\.layers\.2"),
        ("untied", plus("v_head.weight"), r"1 tensor is unexpected \(first: v_head\.weight\)"),
        ("untied", plus("model.norm.weight"), r"model\.norm\.weight is \[2\] where the class has \[64\]"),
        ("experts", without("layers.1.mlp.experts.2.up_proj"), r"what makes up .*1\.mlp\.experts\.gate_up_proj is "),
        ("mixtral", without("layers.1.block_sparse_moe.gate."), r"1 tensor is missing .*1\.mlp\.gate\.weight"),
        ("larger", without("model.layers.1.self_attn.q"), r"1 tensor is missing \(first: .*\.1\.self_attn\.q_proj"),
        ("larger", plus("odd"), r"unexpected"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)  # fmt: skip
def test_gap_is_named(models, tmp_path, name, change, said, way):
    with pytest.raises(ModelError, match=said):
        way(altered(models[name], tmp_path / "altered", change))


def test_quantised_checkpoint_is_whole_where_every_module_has_something(models, tmp_path):
    """GPTQ's names for weights: packed ones with scales; of experts too."""

    def packed(weights):
        kept = {name: tensor for name, tensor in weights.items() if "_proj" not in name}
        for name in set(weights) - set(kept):
            kept |= {name.replace(".weight", ending): torch.zeros(4, 4) for ending in (".qweight", ".scales")}
        return kept

    for name in ("tied", "experts"):
        place = altered(models[name], tmp_path / name, packed)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(
            json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
        )
        look(place)
        lacking = altered(place, tmp_path / f"{name}-lacking", without("layers.1.self_attn.q_proj"))
        with pytest.raises(
            ModelError, match=r"1 tensor is missing \(first: model\.layers\.1\.self_attn\.q_proj\.weight"
        ):
            look(lacking)


def test_architecture_that_transformers_does_not_know_is_left_to_the_engine(models, tmp_path, caplog):
    shutil.copytree(models["tied"], tmp_path / "new")
    config = {"model_type": "newer", "architectures": ["NewerForCausalLM"]}
    (tmp_path / "new/config.json").write_text(json.dumps(config))
    look(tmp_path / "new")
    assert "names of tensors are left to the engine to check, since the config of the student" in caplog.text


def test_files_that_are_not_there_or_not_weights_are_named(models, tmp_path):
    for name in ("cut", "index", "outside"):
        shutil.copytree(models["untied"], tmp_path / name)
    cut = tmp_path / "cut/model.safetensors"
    cut.write_bytes(cut.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read as weights"):
        look(tmp_path / "cut")
    for name, file in (("index", "model-1.safetensors"), ("outside", "../untied/model.safetensors")):
        (tmp_path / name / "model.safetensors").unlink()
        (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(ModelError, match=r"index\.json names the file .*, which is not beside it"):
            look(tmp_path / name)
    with pytest.raises(
        ModelError, match=r"the student 'no/such' cannot be loaded as a language model: .*hub id that can be fetched"
    ):
        load("no/such")
    with pytest.raises(ModelError, match=r"the config of the student 'no/such' cannot be loaded: "):
        load_config("no/such", what="the student", trust_remote_code=False)
    assert ModelError.exit_code == 2 and issubclass(ModelError, (EngineError, TrainingError, EvaluationError))


@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory):
    """An adapter with effect, of the tied model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["tied"])
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    directory = tmp_path_factory.mktemp("adapter")
    wrapped.save_pretrained(directory)
    return directory


def test_adapter_that_fits_is_merged(models, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(8)[None]
    plain = AutoModelForCausalLM.from_pretrained(models["tied"])
    merged = load_causal_lm(models["tied"], what="the teacher", trust_remote_code=False, adapter=adapter)
    assert (merged(ids).logits - plain(ids).logits).abs().max() > 1e-3
    torch.testing.assert_close(
        merged(ids).logits, PeftModel.from_pretrained(plain, str(adapter))(ids).logits, atol=1e-4, rtol=1e-4
    )
    check_checkpoint(models["tied"], what="the teacher", trust_remote_code=False, adapter=adapter)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("Shira", {"r": 2}), ("Adamss", {}), ("VBLoRA", {"vector_length": 16, "num_vectors": 8}), ("Vera", {})],
)
def test_adapter_that_begins_with_weights_or_shares_tensors_is_merged(models, tmp_path, kind, settings):
    """Some kinds choose entries by the model's weights, which a check by names has not; some keep one tensor of all
    layers once.
    """
    import peft
    from transformers import AutoModelForCausalLM

    ids = torch.arange(8)[None]
    config = getattr(peft, f"{kind}Config")(target_modules=["q_proj", "down_proj"], **settings)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(models["tied"]), config)
    for weight in wrapped.parameters():
        weight.data += 0.05 * weight.requires_grad * torch.randn_like(weight)
    wrapped.save_pretrained(tmp_path)
    check_checkpoint(models["tied"], what="the teacher", trust_remote_code=False, adapter=tmp_path)
    merged = load_causal_lm(models["tied"], what="the teacher", trust_remote_code=False, adapter=tmp_path)
    torch.testing.assert_close(merged(ids).logits, wrapped.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    if kind == "VBLoRA":
        stored = load_file(tmp_path / "adapter_model.safetensors")
        rest = {name: tensor for name, tensor in stored.items() if "vector_bank" not in name}
        save_file(rest, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=r"missing .*vector_bank"):
            check_checkpoint(models["tied"], what="the teacher", trust_remote_code=False, adapter=tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed("model.model", "model.language_model.model"), "8 tensors are missing"),
        (without("layers.1.self_attn.q_proj"), r"2 tensors are missing .*layers\.1\.self_attn\.q_proj\.lora_A"),
        (plus("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"), r"1 tensor is unexpected"),
        (lambda w: {n: t[:, :3].contiguous() for n, t in w.items()}, r"cannot be loaded: .*size mismatch"),
    ],
)  # fmt: skip
def test_adapter_that_does_not_fit_is_named(models, adapter, tmp_path, change, said):
    shutil.copytree(adapter, tmp_path / "odd")
    save_file(change(load_file(adapter / "adapter_model.safetensors")), tmp_path / "odd/adapter_model.safetensors")
    settings = {"what": "the teacher", "trust_remote_code": False, "adapter": tmp_path / "odd"}
    for way in (load_causal_lm, check_checkpoint):
        with pytest.raises(ModelError, match=said):
            way(models["tied"], **settings)


@WAYS
def test_adapter_inside_a_models_directory_is_refused(models, adapter, tmp_path, way):
    """transformers would put it on, or load the base that it names instead; vLLM would leave it out."""
    shutil.copytree(models["tied"], tmp_path / "both")
    shutil.copytree(adapter, tmp_path / "both", dirs_exist_ok=True)
    for directory in (tmp_path / "both", adapter):
        with pytest.raises(ModelError, match=r"holds adapter_config\.json, .*; expected a model alone: merge"):
            way(directory)


def test_adapter_that_is_not_there_is_refused(models, tmp_path):
    with pytest.raises(
        ModelError, match=r"the adapter '.*' cannot be loaded: no adapter_config\.json there; expected a directory"
    ):
        load_causal_lm(models["tied"], what="the teacher", trust_remote_code=False, adapter=tmp_path)


def test_code_of_a_tokenizer_never_runs_unasked(models, tmp_path):
    shutil.copy(models["tied"] / "tokenizer.json", tmp_path)
    says = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", "code.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(says))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="the tokenizer brings Python of its own, which runs only where"):
        load_tokenizer(tmp_path, trust_remote_code=False)
    assert not (tmp_path / "ran").exists()


def test_models_are_loaded_in_one_room_and_code_is_always_decided_on():
    """No weights are loaded elsewhere, and no call leaves `trust_remote_code` out, which would ask on the terminal."""
    problems = []
    for path in (
        path for room in ("shared", "teacher_cache", "student_train", "tools") for path in (ROOT / room).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if node.func.attr not in ("from_pretrained", "from_config") or not owner.startswith(("Auto", "Peft")):
                continue
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            names = {keyword.arg for keyword in node.keywords}
            if owner.startswith("Auto") and "trust_remote_code" not in names and None not in names:
                problems.append(f"{where}: {owner}.{node.func.attr} without trust_remote_code")
            if (
                node.func.attr == "from_pretrained"
                and owner in ("AutoModelForCausalLM", "PeftModel")
                and "models" not in path.parts
            ):
                problems.append(f"{where}: loads weights outside shared/models")
    assert not problems
