"""`decant export`: a plain directory that loads: merged weights, the cache's tokenizer, a card with the figures."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from shared.recipe.file import dump_recipe
from student_train.stage.stages import run_stages
from tools.cli import main

PROBE = torch.arange(3, 40)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=PROBE).logits


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the run is kept once it was trained."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def trained(recipe_of, tiny, kept):
    """A run with a LoRA stage, trained, and an evaluation of it."""
    losses = [{"name": "forward_kl", "weight": 0.9, "temperature": 2.0}, {"name": "cross_entropy", "weight": 0.1}]
    student = {"adapter": "lora", "model": str(tiny.llama)}
    recipe = recipe_of(student=student, trainer={"max_steps": 2, "learning_rate": 1e-2}, losses=losses)
    if not kept.exists():
        run_stages(recipe)
        shutil.copytree(recipe.output_dir, kept)
    shutil.copytree(kept, recipe.output_dir, dirs_exist_ok=True)
    (recipe.output_dir / "recipe.yaml").write_text(dump_recipe(recipe))
    (recipe.output_dir / "evaluate").mkdir()
    heldout = {
        "kl_nats": 0.4321,
        "kl_low": 0.4,
        "kl_high": 0.5,
        "top1_agreement": 0.625,
        "perplexity": 3.5,
        "positions": 100,
    }
    tasks = {"math": {"name": "gsm8k", "score": 0.625, "low": 0.5, "high": 0.7, "count": 8}}
    (recipe.output_dir / "evaluate/kd.json").write_text(json.dumps({"model": "kd", "tasks": tasks, "heldout": heldout}))
    return recipe


def test_exported_model_loads_plainly_with_the_merged_weights_and_a_card(trained, tiny, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    run = trained.output_dir
    assert main(["export", str(run), "--keep-adapter"]) == 0
    text = capsys.readouterr().out
    out = run / "export/kd"
    assert f"vllm serve {out}" in text
    assert f"convert_hf_to_gguf.py {out}" in text
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32)
    torch.testing.assert_close(
        logits(saved), logits(PeftModel.from_pretrained(base, str(out / "adapter"))), atol=1e-5, rtol=1e-5
    )
    tokenizer, original = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(tiny.teacher)
    assert (tokenizer.get_vocab(), tokenizer.chat_template) == (original.get_vocab(), original.chat_template)
    assert GenerationConfig.from_pretrained(out).eos_token_id == original.eos_token_id
    card = (out / "README.md").read_text()
    for part in (
        "0.4321",
        "62.5",
        "0.9 x forward_kl at T 2 + 0.1 x cross_entropy",
        "rank 16",
        "2 steps",
        str(tiny.teacher),
    ):
        assert part in card, part
    assert json.loads(card.split("---")[1].split("base_model: ")[1].splitlines()[0]) == str(tiny.llama)


def test_same_export_is_reused_and_another_is_refused(trained, tmp_path, capsys):
    run, out = trained.output_dir, tmp_path / "out"
    assert main(["export", str(run), "--output", str(out), "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["reused"]
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert main(["export", str(run), "--output", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reused"]
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    assert main(["export", str(run), "--output", str(out), "--keep-adapter"]) == 2
    assert "is an export of these weights with keep_adapter false where true is asked for" in capsys.readouterr().err
    assert main(["export", str(run), "--output", str(out), "--dtype", "float16"]) == 2
    assert 'with dtype null where "float16" is asked for' in capsys.readouterr().err
    (out / "model.safetensors").rename(out / "other.bin")
    assert main(["export", str(run), "--output", str(out)]) == 1
    assert "has lost its weights" in capsys.readouterr().err
    (out / "decant-export.json").unlink()
    assert main(["export", str(run), "--output", str(out)]) == 2
    assert "is not an export of these weights" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_weights_are_exported_in_the_type_that_is_asked_for(trained, tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    run, out = trained.output_dir, tmp_path / "half"
    assert main(["export", str(run), "--output", str(out), "--dtype", "bfloat16"]) == 0
    trained_weights = load_file(run / "train/kd/model/model.safetensors")
    saved = load_file(out / "model.safetensors")
    assert saved.keys() == trained_weights.keys()
    for name, tensor in trained_weights.items():
        assert torch.equal(saved[name], tensor.to(torch.bfloat16))
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    assert "stored in bfloat16" in (out / "README.md").read_text()
    name = next(iter(trained_weights))
    trained_weights[name].view(-1)[0] = 1e6
    save_file(trained_weights, run / "train/kd/model/model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["export", str(run), "--output", str(tmp_path / "narrow"), "--dtype", "float16"]) == 2
    assert f"{name} has values beyond its range" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "narrow" in path.name] == []


def test_what_cannot_be_exported_is_refused_in_a_sentence(trained, tmp_path, capsys):
    run = trained.output_dir

    def refused(*words, code=1):
        assert main(["export", *map(str, words)]) == code
        error = capsys.readouterr().err
        assert error.startswith("decant: error: ")
        assert error.count("\n") == 1
        return error

    assert "did you mean 'kd'" in refused(run, "--stage", "kdd", code=2)
    assert "no such directory" in refused(tmp_path / "none", code=2)
    (tmp_path / "empty").mkdir()
    assert "not a run" in refused(tmp_path / "empty", code=2)
    (run / "train/kd/model/generation_config.json").unlink()
    assert "has no generation_config.json" in refused(run)
    (run / "train/kd/done.json").unlink()
    assert "no finished stage" in refused(run)
    assert "'kd'" in refused(run, "--stage", "kd")


@pytest.mark.slow
def test_file_that_cannot_be_copied_is_named_with_what_to_do(trained, tmp_path, capsys):
    (trained.stage_dir("kd") / "model" / "notes.txt").symlink_to("gone")
    assert main(["export", str(trained.output_dir), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "bug" not in error and "notes.txt cannot be written (" in error and "run the same command again" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["model/notes.txt", "model/more", "adapter/adapter_config.json"])
def test_no_file_from_elsewhere_on_the_machine_is_exported(trained, tmp_path, capsys, place):
    (tmp_path / "secret").write_text("{}")
    link = trained.stage_dir("kd") / place
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path if link.name == "more" else tmp_path / "secret")
    out = tmp_path / "out"
    assert main(["export", str(trained.output_dir), "--output", str(out), "--keep-adapter"]) == 2
    assert f"{place} is a link to {tmp_path}" in capsys.readouterr().err
    assert not out.exists()


def test_adapter_of_a_fully_trained_student_is_refused(recipe_of, capsys):
    recipe = recipe_of(trainer={"max_steps": 1})
    run_stages(recipe)
    (recipe.output_dir / "recipe.yaml").write_text(dump_recipe(recipe))
    assert main(["export", str(recipe.output_dir), "--keep-adapter"]) == 2
    assert "trained all of its weights" in capsys.readouterr().err
    assert main(["export", str(recipe.output_dir)]) == 0
    card = (recipe.output_dir / "export/kd/README.md").read_text()
    assert "was not evaluated" in card
    assert "all weights in float32" in card


def test_card_cannot_be_broken_by_names(trained):
    from tools.export.model_card import model_card

    bad = trained.model_copy(update={"name": "a\n# b | `c` <img>"})
    card = model_card(bad, bad.stages[0], {"models": {}, "stages": {}}, [], "w")
    assert "\n# b" not in card
    assert "<img>" not in card
