"""What a student may be, where stages start, and what is left on disk at the end."""

from __future__ import annotations

import json

import pytest
import torch

from shared.errors import IdentityError, TrainingError
from shared.recipe.recipe import Recipe, Student
from student_train.batch.dataset import CacheList
from student_train.stage.export import set_generation
from student_train.stage.stages import run_stages
from student_train.student.student import add_adapter, load_student
from student_train.student.student_head import check_head, head_of
from tests.tiny_models import make_qwen2

PROBE = torch.arange(3, 40)[None]


def load(path, **settings):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **settings).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=PROBE).logits


@pytest.fixture(scope="module")
def caches(tiny):
    return CacheList.open([tiny.cache], None)


def student(path, **settings):
    return Student.model_validate({"model": str(path), **settings})


@pytest.mark.parametrize(
    "family", ["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "padded"))]
)
def test_saved_model_loads_plainly_with_tied_untied_and_padded_heads(recipe_of, tiny, family):
    recipe = recipe_of(student={"model": str(getattr(tiny, family))}, trainer={"max_steps": 3})
    (model_dir,) = run_stages(recipe)
    saved, last = load(model_dir), load(model_dir.parent / "checkpoint-3")
    torch.testing.assert_close(logits(saved), logits(last), rtol=0, atol=0)
    assert (logits(saved) - logits(load(getattr(tiny, family)))).abs().max() > 1e-3, "training moved it"
    config = json.loads((model_dir / "config.json").read_text())
    assert config["tie_word_embeddings"] == (family != "llama")
    assert config["use_cache"]
    assert saved.config.vocab_size == (576 if family == "padded" else 512)


def test_saved_model_has_the_caches_tokenizer_template_and_end_token(recipe_of, tiny):
    from transformers import AutoTokenizer, GenerationConfig

    (model_dir,) = run_stages(recipe_of(trainer={"max_steps": 1}))
    saved, original = AutoTokenizer.from_pretrained(model_dir), AutoTokenizer.from_pretrained(tiny.teacher)
    assert saved.chat_template == original.chat_template
    assert saved.get_vocab() == original.get_vocab()
    assert GenerationConfig.from_pretrained(model_dir).eos_token_id == original.eos_token_id


def test_end_token_of_a_base_model_joins_that_of_the_template(tiny):
    from transformers import AutoTokenizer

    model = load(tiny.qwen3)
    model.generation_config.eos_token_id = 0
    set_generation(model, tiny.teacher)
    assert model.generation_config.eos_token_id == [AutoTokenizer.from_pretrained(tiny.teacher).eos_token_id, 0]


def test_adapter_is_merged_into_the_model_and_kept_beside_it(recipe_of, tiny):
    from peft import PeftModel

    recipe = recipe_of(
        student={"adapter": "lora", "model": str(tiny.llama)}, trainer={"max_steps": 3, "learning_rate": 1e-2}
    )
    (model_dir,) = run_stages(recipe)
    adapted = PeftModel.from_pretrained(load(tiny.llama), str(model_dir.parent / "adapter")).eval()
    torch.testing.assert_close(logits(load(model_dir)), logits(adapted), atol=1e-5, rtol=1e-5)
    assert (logits(adapted) - logits(load(tiny.llama))).abs().max() > 1e-3
    assert not list(model_dir.glob("adapter*"))


@pytest.mark.slow
def test_next_stage_starts_from_the_merged_model(recipe_of, tiny):
    """With nothing to learn from (learning rate 1e-30) the second stage's model is the first's."""
    recipe = recipe_of(student={"adapter": "lora"}, trainer={"max_steps": 2, "learning_rate": 1e-2})
    document = recipe.model_dump(mode="json")
    second = {**document["stages"][0], "name": "second", "init_from": "previous"}
    second["trainer"] = {**second["trainer"], "learning_rate": 1e-30}
    document["stages"].append(second)
    first_dir, second_dir = run_stages(Recipe.model_validate(document))
    torch.testing.assert_close(logits(load(second_dir)), logits(load(first_dir)), atol=1e-6, rtol=0)
    assert (logits(load(first_dir)) - logits(load(tiny.qwen3))).abs().max() > 1e-3


def test_stage_that_starts_from_an_untrained_one_is_refused(recipe_of):
    document = recipe_of().model_dump(mode="json")
    document["stages"].append({**document["stages"][0], "name": "second", "init_from": "kd"})
    with pytest.raises(
        TrainingError, match=r"'second' starts from stage 'kd', which has no model in .*; train that one first"
    ):
        run_stages(Recipe.model_validate(document), from_stage="second")


@pytest.mark.parametrize(
    ("modules", "unmet"),
    [(["q_proj", "kproj"], "'kproj'"), (["0.mlp.up_proj", "proj", "up"], "'proj', 'up'")],
)
def test_a_name_that_no_adapted_layer_has_is_refused_beside_names_that_are_met(caches, tiny, modules, unmet):
    wanted = student(tiny.llama, adapter={"kind": "lora", "target_modules": modules})
    with pytest.raises(TrainingError, match=f"no layer is called {unmet}.*; set it to all-linear or to names"):
        add_adapter(load_student(wanted, None, caches), wanted.adapter)


@pytest.mark.parametrize("modules", [["lm_head"], ["q_proj", "embed_tokens"], r".*(q_proj|lm_head)"])
def test_adapter_on_head_or_embeddings_is_refused(caches, tiny, modules):
    wanted = student(tiny.llama, adapter={"kind": "lora", "target_modules": modules})
    with pytest.raises(TrainingError, match=r"puts an adapter on the (head|embeddings)"):
        add_adapter(load_student(wanted, None, caches), wanted.adapter)


def test_adapter_that_matches_nothing_is_refused(caches, tiny):
    wanted = student(tiny.llama, adapter={"kind": "lora", "target_modules": ["query"]})
    with pytest.raises(TrainingError, match="cannot be adapted"):
        add_adapter(load_student(wanted, None, caches), wanted.adapter)


def test_all_linear_leaves_the_head_plain_and_covers_the_rest(caches, tiny):
    wanted = student(tiny.llama, adapter="lora")
    model = add_adapter(load_student(wanted, None, caches), wanted.adapter)
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_student_whose_type_changes_the_tokenizer_is_refused_with_a_text(caches, tmp_path):
    of_qwen2 = make_qwen2(tmp_path / "qwen2", num_layers=1)
    with pytest.raises(IdentityError, match=r"is of the type qwen2, .* 'In 2024, .*' would be other tokens"):
        load_student(student(of_qwen2), None, caches)


def test_student_of_another_tokenizer_is_refused_with_both(caches, tiny, tmp_path):
    import shutil

    shutil.copytree(tiny.qwen3, tmp_path / "other")
    path = tmp_path / "other/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].reverse()
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(IdentityError, match=f"has tokenizer .* was built with {caches.tokenizer_hash}"):
        load_student(student(tmp_path / "other"), None, caches)
    path.unlink()
    (tmp_path / "other/tokenizer_config.json").unlink()
    with pytest.raises(TrainingError, match=r"without tokenizer\.json"):
        load_student(student(tmp_path / "other"), None, caches)


def test_student_that_is_not_there_is_refused(caches):
    with pytest.raises(TrainingError, match="'nowhere/at-all'"):
        load_student(student("nowhere/at-all"), None, caches)


def test_random_weights_depend_on_the_seed_alone_and_have_no_padding(caches, tiny):
    wanted = student(tiny.padded, init="random")
    one, same, other = (load_student(wanted, None, caches, seed=seed) for seed in (1, 1, 2))
    torch.rand(1)
    assert one.config.vocab_size == 512
    assert torch.equal(logits(one.eval()), logits(same.eval()))
    assert not torch.allclose(logits(one), logits(other.eval()))


def tiny_config(family):
    from transformers import CohereConfig, Gemma2Config, GraniteConfig

    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
    }
    return {
        "softcap": lambda: Gemma2Config(**sizes, head_dim=32, final_logit_softcapping=3.0),
        "scaled": lambda: CohereConfig(**sizes, logit_scale=0.25),
        "divided": lambda: GraniteConfig(**sizes, logits_scaling=8.0),
    }[family]()


@pytest.mark.parametrize("family", ["softcap", "scaled", "divided"])
def test_scaled_and_capped_logits_are_honoured(family):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
    head = head_of(model, 512)
    check_head(model, head)
    plain = head_of(model, 512).__class__(head.module, 512)
    with pytest.raises(TrainingError, match="does not declare"):
        check_head(model, plain)


def test_model_with_a_twist_of_its_own_is_refused(tiny):
    model = load(tiny.qwen3)
    head = head_of(model, 512)
    original = model.lm_head.forward
    model.lm_head.forward = lambda hidden: original(hidden) * 1.5
    with pytest.raises(TrainingError, match="in a way that its config does not declare"):
        check_head(model, head)


def test_head_smaller_than_the_vocabulary_is_refused(tiny):
    with pytest.raises(TrainingError, match="512 rows where the cache's tokenizer has 600"):
        head_of(load(tiny.qwen3), 600)


@pytest.mark.slow
def test_bfloat16_compute_trains_float32_weights(recipe_of):
    recipe = recipe_of(trainer={"bf16": True, "max_steps": 3})
    (model_dir,) = run_stages(recipe)
    assert {parameter.dtype for parameter in load(model_dir).parameters()} == {torch.float32}
    health = json.loads((model_dir.parent / "health.json").read_text())
    assert health["healthy"]


@pytest.mark.slow
def test_recomputed_activations_change_nothing(recipe_of, tmp_path):
    logs = []
    for checkpointing in (False, True):
        recipe = recipe_of(
            student={"gradient_checkpointing": checkpointing, "adapter": "lora"}, trainer={"max_steps": 2}
        )
        recipe = recipe.model_copy(update={"output_dir": tmp_path / str(checkpointing)})
        run_stages(recipe)
        logs.append(
            [json.loads(line) for line in (recipe.output_dir / "train/kd/metrics.jsonl").read_text().splitlines()]
        )
    for plain, recomputed in zip(*logs, strict=True):
        assert plain["grad_norm"] == pytest.approx(recomputed["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_tensorboard_gets_every_term(recipe_of):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = recipe_of(trainer={"report_to": "tensorboard", "max_steps": 2})
    (model_dir,) = run_stages(recipe)
    events = EventAccumulator(str(model_dir.parent / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/forward_kl", "train/cross_entropy", "train/grad_norm"} <= set(events.Tags()["scalars"])


def _extended(source, target):
    """Save a model whose tokenizer got two tokens more and whose embeddings and head got rows for them."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(source), load(source)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize("family", ["qwen3", pytest.param("llama", marks=pytest.mark.slow)])
def test_tokenizer_extended_after_training_leaves_what_was_learned(recipe_of, tiny, tmp_path, family):
    (model_dir,) = run_stages(recipe_of(student={"model": str(getattr(tiny, family))}, trainer={"max_steps": 2}))
    extended = load(_extended(model_dir, tmp_path / "extended"))
    assert logits(extended).shape[-1] == 514
    torch.testing.assert_close(logits(extended)[..., :512], logits(load(model_dir)), rtol=0, atol=0)


def test_student_with_an_extended_tokenizer_is_refused_for_a_cache_of_the_plain_one(caches, tiny, tmp_path):
    with pytest.raises(IdentityError, match=f"has tokenizer .* was built with {caches.tokenizer_hash}"):
        load_student(student(_extended(tiny.llama, tmp_path / "extended")), None, caches)
