"""The small twin of a recipe: the same stages, losses, schedules and captures, with models of the same shape made on
the spot.

Models get the recipe's stated architecture, number of layers included, at a width of 64 and with the tests' tokenizer.
What needs a GPU, several of them or a network is replaced by what a CPU has: the transformers engine, plain AdamW, LoRA
over weights that are not quantised. Everything else stays as the recipe says, only shorter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.system.program import ROOT, write_lines
from tests.tiny_models import VOCAB_SIZE, make_tokenizer

STEPS = 6
EVERY = 2
TASK_FILES = {
    "copying": "copy.test.jsonl.gz",
    "gsm8k": "math.test.jsonl.gz",
    "humaneval": "code.test.jsonl.gz",
    "keywords": "aiops.test.jsonl.gz",
}


def write_twin(name: str, place: Path) -> dict[str, Any]:
    """Write models, data and `twin.yaml` below `place`; return the twin as plain data."""
    twin = YAML(typ="safe").load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    stated = twin.pop("assume")
    for role in ("teacher", "student"):
        make_model(place / role, stated[role]["config"])
        twin[role]["model"] = str(place / role)
    _small_teacher(twin["teacher"], place)
    for prompt in twin["prompts"]:
        prompt["path"] = str(_write_prompts(place / f"{prompt['source']}.jsonl", prompt))
        prompt.pop("limit", None)
    if (hidden := twin["capture"].get("hidden")) and "projection" in hidden:
        hidden["projection"] = 32
    if "generate" in twin:
        twin["generate"]["max_new_tokens"] = 12
    twin |= {"output_dir": str(place / "run"), "cache": str(place / "run" / "cache"), "heldout": {"fraction": 0.3}}
    _small_training(twin)
    _small_evaluation(twin["evaluate"])
    with (place / "twin.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(twin, file)
    return twin


def make_model(directory: Path, stated: dict[str, Any]) -> None:
    """Save a random model of the stated architecture and depth, 64 wide."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(directory)
    same_heads = stated["num_attention_heads"] == stated["num_key_value_heads"]
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2 if same_heads else 1,
    }
    sizes |= {"intermediate_size": 96, "max_position_embeddings": 512, "initializer_range": 0.2}
    sizes |= {"head_dim": 32} if "head_dim" in stated else {}
    sizes |= (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} if "num_experts" in stated else {}
    )
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(len(directory.name))
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**{**stated, **sizes, **ends}), dtype=torch.float32
        )
        model.get_output_embeddings().weight[tokenizer.eos_token_id] = 0.0  # no answer is empty
    model.save_pretrained(directory, safe_serialization=True)


def _small_teacher(teacher: dict[str, Any], place: Path) -> None:
    teacher |= {"engine": "transformers", "dtype": "float32", "max_model_len": 256}
    for name in ("tensor_parallel_size", "workers"):
        teacher.pop(name, None)
    if "adapter" in teacher:
        teacher["adapter"] = str(_write_adapter(place / "adapter", place / "teacher"))


def _write_adapter(directory: Path, base: Path) -> Path:
    """Save a LoRA whose second matrix is not zero, so that it changes what the teacher says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    model.save_pretrained(directory)
    return directory


def _write_prompts(path: Path, prompt: dict[str, Any]) -> Path:
    words = ("apples", "servers", "disks", "packets", "tickets", "alarms", "pods", "lines")
    rows: list[dict[str, Any]] = []
    for number in range(20):
        text = f"{prompt['source']}: Anna has {number} {words[number % 8]}"
        answer = f"1. She has {number}.\n2. The answer is {number}."
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        rows.append({"text": f"{text}. {answer}"} if prompt["format"] == "text" else {"messages": turns})
    write_lines(path, rows)
    return path


def _small_training(twin: dict[str, Any]) -> None:
    adapter = twin["student"].get("adapter")
    if isinstance(adapter, dict) and adapter["kind"] == "qlora":
        adapter["kind"] = "lora"
    twin["student"]["dtype"] = "float32"
    for stage in twin["stages"]:
        stage["trainer"].pop("rounding", None)  # the twin trains in float32
        stage["trainer"].pop("num_train_epochs", None)
        stage["trainer"] |= {
            "max_steps": STEPS,
            "pack_tokens": 256,
            "gradient_accumulation_steps": 1,
            "optim": "adamw_torch",
        }
        stage["trainer"]["report_to"] = ["tensorboard"]
        stage.pop("max_length", None)
        if "evaluate" in stage:
            stage["evaluate"] |= {"every_steps": EVERY, "rows_per_source": 4}
            stage["evaluate"] |= {"samples": 1, "sample_tokens": 4} if stage["evaluate"].get("samples") else {}
        if "every_steps" in stage.get("sampling", {}):
            stage["sampling"]["every_steps"] = EVERY


def _small_evaluation(evaluate: dict[str, Any]) -> None:
    evaluate |= {"engine": "transformers", "max_new_tokens": 8}
    for task in evaluate.get("tasks", ()):
        task |= {"path": str(ROOT / "data" / "demo" / TASK_FILES[task["name"]]), "limit": 2}


def report_of(place: Path) -> dict[str, Any]:
    """Return what the twin's report.json says."""
    found: dict[str, Any] = json.loads((place / "run" / "report.json").read_text(encoding="utf-8"))
    return found
