"""Wrong inputs, each refused by `plan` before any work: place, found, expected, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.system.program import write_lines
from tests.tiny_models import make_qwen2, make_qwen3
from tools import cli

RECIPE = """\
name: wrong
output_dir: run
teacher: {model: teacher, engine: transformers, dtype: float32, max_model_len: 96}
prompts: [{source: a, path: prompts.jsonl, format: messages}]
generate: {max_new_tokens: 6}
capture: {k: 8}
cache: run/cache
student: {model: student}
stages: [{name: kd, losses: [{name: forward_kl}], trainer: {max_steps: 2, pack_tokens: 128}}]
evaluate: {models: [teacher, base, kd], tasks: [{name: gsm8k, path: sums.jsonl}]}
"""

TRAINER, LOSS = "stages.kd.trainer", "stages.kd.losses.0"
WRONG = [
    # what is set (YAML), the place that is blamed, a part of the sentence
    ("student.model=/no/such/dir", "student.model", "no directory '/no/such/dir'"),
    ("student.model=./studnt", "student.model", "did you mean 'student'?"),
    ("student.model=org/no-such-model", "student.model", "neither a directory nor a hub id"),
    ("student.model=prompts.jsonl", "student.model", "is a file"),
    ("student.model=empty", "student.model", "config.json"),
    ("student.model=broken", "student.model", "config.json"),
    ("student.model=without-tokenizer", "student.model", "has no tokenizer.json"),
    ("student.model=other", "student.model", "choose a student with the same tokenizer"),
    ("student.model=of-qwen2", "student.model", "'In 2024, 12345 x 3.14159 = ?' would be other tokens"),
    ("student.model=missing-tensor", "student.model", "model.norm.weight"),
    ("student.model=narrow", "student.model", "500 rows in its output layer"),
    ("student={model: narrow, init: random}", "student.model", "the teacher's tokenizer has 512 tokens"),
    ("student.model=reshaped", "student.model", "model.norm.weight"),
    ("student.model=quantised", "student.model", "is stored quantised (gptq), and such weights cannot be trained"),
    ("student={model: quantised, adapter: lora}", "student.model", "take the model that it was made from"),
    ("student={model: quantised, init: random}", "student.model", "is stored quantised (gptq)"),
    ("student.model=of-a-new-type", "student.model", "cannot be loaded: "),
    ("student.model=with-python", "student.model", "brings Python of its own, which runs only where its section of"),
    ("student.model=cut-short", "student.model", "cannot be read as weights"),
    ("teacher.model=missing-tensor", "teacher.model", "model.norm.weight"),
    ("generate.model=missing-tensor", "generate.model", "model.norm.weight"),
    ("teachers={b: {model: other, engine: transformers}}", "teachers.b.model", "teachers of one cache share"),
    ("teachers={b: {model: missing-tensor, engine: transformers}}", "teachers.b.model", "model.norm.weight"),
    ("teachers={b: {model: teacher, engine: transformers, dtype: float32}}", "teachers.b.model", "leave 'b' out"),
    ("stages.kd.targets=[{layer: teacher, sources: [b]}]", "stages.0.targets.0.sources.0", "no row has the source 'b'"),
    ("stages.kd.targets=[{layer: techer}]", "stages.0.targets.0.layer", "targets layer"),
    ("stages.kd.init_from=./cut-short", "stages.0.init_from", "cannot be read as weights"),
    ("student.adapter={kind: lora, target_modules: [query_key]}", "student.adapter.target_modules", "query_key"),
    ('student.adapter={kind: lora, target_modules: "("}', "student.adapter.target_modules", "cannot be adapted"),
    ("student.adapter={kind: lora, target_modules: 'no_such.*'}", "student.adapter.target_modules", "no_such"),
    ("student.adapter={kind: lora, target_modules: [lm_head]}", "student.adapter.target_modules", "head"),
    ("student.revision=main", "student.model", "leave the revision out"),
    (f"{LOSS}={{name: tail_weighted_kl}}", "stages.0.losses.0.name", "does not tell the shape of the tail"),
    ("teacher.model=./techer", "teacher.model", "did you mean 'teacher'?"),
    ("teacher.model=org/no-such-model", "teacher.model", "neither a directory nor a hub id"),
    ("teacher.adapter=nowhere", "teacher.adapter", "adapter_config.json"),
    ("teacher.adapter=student", "teacher.adapter", "adapter_config.json"),
    ("teacher.engine=vlm", "teacher.engine", "is not one of"),
    ("evaluate.max_new_tokens=500", "evaluate.tasks.0.path", "'teacher' reads 512 together; lower max_new_tokens"),
    ("evaluate.models=[kd] and evaluate.max_new_tokens=500", "evaluate.tasks.0.path", "'kd' reads 512 together"),
    ("generate.model=./nobody", "generate.model", "no directory './nobody'"),
    ("prompts.a.path=nowhere.jsonl", "prompts.0.path", "nowhere.jsonl"),
    ("prompts.a.path=empty", "prompts.0.path", "expected prompts"),
    ("prompts.a.chat_template=nowhere.jinja", "prompts.0.chat_template", "nowhere.jinja"),
    ("prompts=[{path: run, format: cache}]", "prompts.0", "generate"),
    ("seed=-1", "seed", "from 0 to 4294967295"),
    ("seed=99999999999", "seed", "from 0 to 4294967295"),
    (f"{TRAINER}.seed=99999999999", "trainer.seed", "4294967295"),
    (f"{TRAINER}.pack_tokens=1000000000000000000", "trainer.pack_tokens", "2147483647"),
    (f"{TRAINER}.pack_tokens=true", "trainer.pack_tokens", "a number"),
    (f"{TRAINER}.optim=adamw_torc", "trainer.optim", "did you mean 'adamw_torch'?"),
    (f"{TRAINER}.optim=nonsense", "trainer.optim", "no optimizer that a stage can use"),
    (f"{TRAINER}.report_to=wandbb", "trainer.report_to", "is not one of"),
    (f"{TRAINER}.learning_rate=0", "trainer.learning_rate", "greater than 0"),
    ("student.adapter=loraa", "student.adapter", "is not one of"),
    ("student={model: student, init: random, adapter: qlora}", "student.adapter", "init: random"),
    ("student={model: student, init: random}", "evaluate.models.1", "random weights"),
    ("evaluate.models=[kdd]", "evaluate.models.0", "did you mean 'kd'?"),
    ("evaluate.tasks.0.path=nowhere.jsonl", "evaluate.tasks.0.path", "nowhere.jsonl"),
    ("evaluate.tasks.0.path=prompts.jsonl", "evaluate.tasks.0.path", "not a row of the task"),
    ("evaluate.side_by_side={prompts: [nowhere.jsonl]}", "evaluate.side_by_side.prompts", "no file 'nowhere.jsonl'"),
    ("evaluate.own_answers={prompts: 5}", "evaluate.own_answers.prompts", "are there that are held out"),
    ("stages.kd.rounds={prompts: 9}", "stages.0.rounds.prompts", "are there that are not held out"),
    ("student.adapter={r: 8}", "student.adapter.r", "write lora or qlora"),
    (f"{TRAINER}={{optim: sgd, adam_beta1: 0.5}}", "trainer.adam_beta1", "'sgd' does not use it"),
    ("generate={temperature: 0, top_p: 0.5}", "generate.top_p", "raise the temperature"),
    ("stages.kd.init_from=./nowhere", "stages.0.init_from", "no directory"),
    ("stages.kd.init_from=./empty", "stages.0.init_from", "config.json"),
    ("stages.kd.targets=tops9", "stages.0.targets", "no targets layer"),
    ("stages.kd.mixture={b: 1.0}", "stages.0.mixture.b", "no row has the source 'b'"),
    (f"{LOSS}.name=hidden", "stages.0.losses.0.name", "reads a hidden layer"),
    (
        f"capture.hidden={{layers: 1}} and {LOSS}.name=attention",
        "stages.0.losses.0.name",
        "add `attention` to capture.hidden",
    ),
    (f"capture.hidden={{layers: 1}} and {LOSS}.name=contrastive", "stages.0.losses.0.name", "pooled to mean or last"),
    (
        f"capture.hidden={{pooled: mean}} and {LOSS}.name=hidden",
        "stages.0.losses.0.name",
        "add `layers` to capture.hidden",
    ),
    (
        f"capture.hidden={{layers: 1}} and {LOSS}={{name: hidden, layer_map: {{1: 7}}}}",
        "stages.0.losses.0.name",
        "maps to layer 7 of a student that has 1",
    ),
    (
        f"capture.hidden={{attention: {{}}}} and {LOSS}.name=attention and student.attention=eager",
        "stages.0.losses.0.name",
        "set it to sdpa",
    ),
    (
        f"capture.hidden={{layers: 1}} and {LOSS}.name=hidden and {TRAINER}.torch_compile=true",
        "losses.0.name",
        "torch_compile",
    ),
    (
        f"{TRAINER}={{lr_scheduler_type: constant, lr_scheduler_kwargs: {{min_lr: 1}}}}",
        "stages.0.trainer.lr_scheduler_type",
        "has no options",
    ),
    (f"{LOSS}.temperature=2.0", "stages.0.losses.0.temperature", "not captured"),
    ('output_dir="a\\0b"', "output_dir", "\\x00"),
    ("output_dir=prompts.jsonl/run", "output_dir", "is a file"),
    ("output_dir=run/cache", "output_dir", "lies in the cache"),
    ("output_dir=run/cache/mine", "output_dir", "where nothing else belongs"),
    ("cache=run", "output_dir", "lies in the cache"),
    ("cache=s3:/bucket/demo", "cache", "write s3://bucket/demo"),
    (f"output_dir={'x' * 300}", "output_dir", "cannot be a directory"),
    ("cache=prompts.jsonl", "cache", "is a file"),
    ("cache=student", "cache", "no cache"),
    ("generate.temperature=1e-30", "generate.temperature", "set it to 0"),
    ("evaluate.tasks.gsm8k.temperature=0.005", "evaluate.tasks.0.temperature", "set it to 0"),
    ("evaluate.tasks.gsm8k.temperature=2.5", "evaluate.tasks.0.temperature", "vLLM samples at temperatures up to 2"),
    ("evaluate.side_by_side.temperatures=[0.7, 3]", "evaluate.side_by_side.temperatures.1", "vLLM samples"),
    ("stages.kd.rounds={temperature: 0.001}", "stages.0.rounds.temperature", "set it to 0"),
    (f"{TRAINER}.lr_scheduler_kwargs={{min_lr: 1e-6}}", "stages.0.trainer.lr_scheduler_type", "cosine with"),
    (f"{TRAINER}.lr_scheduler_type=cosine_with_min_lr", "stages.0.trainer.lr_scheduler_type", "no options"),
    ("stages.²=1", "stages", "²"),
    ("stages.kd.trainr=1", "stages.0.trainr", "did you mean 'trainer'?"),
]


def damage_weights(path: Path) -> None:
    """Make three students that are not whole: a tensor missing, one of another shape, a file cut short."""
    for name in ("missing-tensor", "reshaped", "cut-short"):
        shutil.copytree(path / "student", path / name)
    tensors = load_file(path / "student" / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, path / "missing-tensor" / "model.safetensors", {"format": "pt"})
    reshaped = {**tensors, "model.norm.weight": np.concatenate([norm, norm])}
    save_file(reshaped, path / "reshaped" / "model.safetensors", {"format": "pt"})
    whole = (path / "student" / "model.safetensors").read_bytes()
    (path / "cut-short" / "model.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("preflight")
    for seed, name in enumerate(("teacher", "student", "other", "without-tokenizer")):
        make_qwen3(path / name, seed=seed, num_layers=1)
    make_qwen2(path / "of-qwen2", num_layers=1)
    make_qwen3(path / "narrow", seed=4, num_layers=1, vocab_size=500)
    shutil.copytree(path / "student", path / "quantised")
    config = json.loads((path / "student" / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (path / "quantised" / "config.json").write_text(json.dumps(quantised))
    for name, code in (("of-a-new-type", {}), ("with-python", {"auto_map": {"AutoConfig": "own.Config"}})):
        shutil.copytree(path / "student", path / name)
        (path / name / "config.json").write_text(json.dumps({**config, "model_type": "of_tomorrow", **code}))
    for file in path.glob("without-tokenizer/*token*"):
        file.unlink()
    document = json.loads((path / "other" / "tokenizer.json").read_text())
    document["added_tokens"][0]["content"] = "<|other|>"
    document["model"]["vocab"]["<|other|>"] = document["model"]["vocab"].pop("<|endoftext|>")
    (path / "other" / "tokenizer.json").write_text(json.dumps(document))
    damage_weights(path)
    for name, text in (("empty", None), ("broken", "{")):
        (path / name).mkdir()
        if text:
            (path / name / "config.json").write_text(text)
    write_lines(
        path / "prompts.jsonl", [{"messages": [{"role": "user", "content": f"How many are {i}?"}]} for i in range(8)]
    )
    write_lines(path / "sums.jsonl", [{"question": "Two and two?", "answer": "#### 4"}])
    (path / "recipe.yaml").write_text(RECIPE)
    return path


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def test_the_recipe_itself_is_planned(capsys):
    assert cli.main(["plan", "recipe.yaml"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "change, blamed, part", WRONG, ids=[f"{i}-{change[:30]}" for i, (change, *_) in enumerate(WRONG)]
)
def test_a_wrong_input_is_refused_by_plan_with_its_place(capsys, place, change, blamed, part):
    before = sorted(place.rglob("*"))
    changes = [word for one in change.split(" and ") for word in ("--set", one)]
    assert cli.main(["plan", "recipe.yaml", *changes]) == 2
    error = capsys.readouterr().err
    assert error.startswith("decant: error: ") and "bug" not in error and "Traceback" not in error
    assert blamed in error and part in error
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(("kind", "part"), [("other", "tokenizer_hash is "), ("retold", "template is ")])
@pytest.mark.parametrize("command", ["plan", "teach"])
def test_a_cache_of_another_tokenizer_or_template_is_refused_before_any_work(
    capsys, place, tmp_path, command, kind, part
):
    """It was found by `teach` alone, once it had begun, and `plan` said nothing."""
    words = ["recipe.yaml", "--set", f"cache={tmp_path / 'cache'}", "--set", "generate=null"]
    words += ["--set", f"output_dir={tmp_path / 'run'}"]
    words += ["--set", "prompts.a.path=sums.jsonl", "--set", "prompts.a.format=prompt_completion"]
    words += ["--set", "prompts.a.columns={prompt: question, completion: answer}"]
    assert cli.main(["teach", *words]) == 0
    capsys.readouterr()
    if kind == "retold":
        shutil.copytree(place / "teacher", tmp_path / "retold")
        with (tmp_path / "retold" / "chat_template.jinja").open("a") as file:
            file.write("{# another #}")
    model = tmp_path / "retold" if kind == "retold" else "other"
    assert cli.main([command, *words, "--set", f"teacher.model={model}"]) == 2
    error = capsys.readouterr().err
    assert "cache.0: " in error and "cannot be extended: " + part in error and "use another cache directory" in error


def test_a_temperature_that_the_engine_of_the_recipe_samples_at_is_planned(capsys):
    assert cli.main(["plan", "recipe.yaml", "--set", "generate.temperature=2.5"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "change, blamed, part",
    [
        (f"{TRAINER}.tf32=true", "stages.0.trainer.tf32", "no NVIDIA GPU"),
        (f"{TRAINER}.fp16=true", "stages.0.trainer.fp16", "no NVIDIA GPU"),
        (f"{TRAINER}.operator=triton", "stages.0.trainer.operator", "an NVIDIA GPU"),
        (f"{TRAINER}.fsdp=full_shard", "stages.0.trainer.fsdp", "torchrun"),
        ("student.liger=true", "student.liger", "an NVIDIA GPU"),
        ("student.attention=flash_attention_2", "student.attention", "the package flash-attn"),
        ("student.adapter=qlora", "student.adapter", "the package bitsandbytes"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without an NVIDIA GPU")
def test_what_this_machine_cannot_train_is_found_by_run_before_the_teacher_works(capsys, place, change, blamed, part):
    before = sorted(place.rglob("*"))
    assert cli.main(["run", "recipe.yaml", "--set", change]) == 2
    error = capsys.readouterr().err
    assert blamed in error and part in error and "generate" not in error
    assert sorted(place.rglob("*")) == before
    assert cli.main(["plan", "recipe.yaml", "--set", change]) == 0  # perhaps for another machine


@pytest.mark.parametrize("command", ["teach", "train", "run"])
def test_every_command_that_needs_it_refuses_the_same_and_leaves_nothing(capsys, place, command):
    wrong = "teacher.model=./techer" if command != "train" else "student.model=./studnt"
    before = sorted(place.rglob("*"))
    assert cli.main([command, "recipe.yaml", "--set", wrong]) == 2
    error = capsys.readouterr().err
    assert "did you mean" in error and error.startswith("decant: error: --set ")
    assert sorted(place.rglob("*")) == before


def test_all_problems_are_listed_with_their_lines(capsys, place):
    text = RECIPE.replace("student: {model: student}", "student: {model: ./studnt}").replace(
        "sums.jsonl", "nowhere.jsonl"
    )
    (place / "two.yaml").write_text(text)
    assert cli.main(["plan", "two.yaml"]) == 2
    error = capsys.readouterr().err
    assert "two.yaml:8: student.model: " in error and "two.yaml:10: evaluate.tasks.0.path: " in error


@pytest.mark.parametrize("command, stage_there", [("plan", False), ("run", False), ("plan", True)])
def test_a_disk_too_small_for_the_stages_is_found_before_any_work(capsys, place, monkeypatch, command, stage_there):
    from student_train.fit import disk_space

    if stage_there:  # nothing is left to write
        (place / "done" / "train" / "kd" / "model").mkdir(parents=True)
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: 1000)
    settings = ["--set", "output_dir=done"] if stage_there else []
    before = sorted(place.rglob("*"))
    assert cli.main([command, "recipe.yaml", *settings]) == (0 if stage_there else 2)
    error = capsys.readouterr().err
    assert stage_there or "stage 'kd' needs" in error
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("free", [0, 1000])
def test_a_disk_too_small_for_the_cache_is_found_by_plan_and_run(capsys, place, monkeypatch, free):
    from types import SimpleNamespace

    from tools.plan import planner

    monkeypatch.setattr(planner, "disk_usage", lambda path: SimpleNamespace(free=free))
    before = sorted(place.rglob("*"))
    for command in ("plan", "run"):
        assert cli.main([command, "recipe.yaml", "--set", "output_dir=other", "--set", "cache=other/cache"]) == 2
        error = capsys.readouterr().err
        assert "the cache needs about" in error and "make room" in error
    assert sorted(place.rglob("*")) == before


def test_a_broken_student_is_found_by_run_before_the_teacher_works(capsys, place):
    assert cli.main(["run", "recipe.yaml", "--set", "student.model=missing-tensor"]) == 2
    assert "model.norm.weight" in capsys.readouterr().err
    assert not (place / "run").exists()


EVALUATED = [
    ("teacher.model=org/no-such-model", "teacher.model", "neither a directory nor a hub id"),
    ("teacher.model=./techer", "teacher.model", "did you mean 'teacher'?"),
    ("teacher.model=a/b/c", "teacher.model", "no directory 'a/b/c'"),
    ("teacher.model=missing-tensor", "teacher.model", "model.norm.weight"),
    ("student.model=empty", "student.model", "config.json"),
    ("student.model=broken", "student.model", "config.json"),
    ("student.model=cut-short", "student.model", "cannot be read as weights"),
    ("student.model=prompts.jsonl", "student.model", "is a file"),
    ("evaluate.models=[kd]", "evaluate.models.0", "run `decant train` first"),
    ("evaluate.tasks.0.path=nowhere.jsonl", "evaluate.tasks.0.path", "nowhere.jsonl"),
]


@pytest.mark.parametrize("cost", ["false", "true"])
@pytest.mark.parametrize("change, blamed, part", EVALUATED, ids=[change[:40] for change, *_ in EVALUATED])
def test_an_evaluation_of_models_that_are_not_whole_is_refused_before_any_work(
    capsys, place, cost, change, blamed, part
):
    before = sorted(place.rglob("*"))
    settings = ["evaluate.models=[teacher, base]", f"evaluate.cost={cost}", change]
    words = [word for setting in settings for word in ("--set", setting)]
    assert cli.main(["eval", "recipe.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("decant: error: ") and "bug" not in error and "Traceback" not in error
    assert blamed in error and part in error
    assert sorted(place.rglob("*")) == before
