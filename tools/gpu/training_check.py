"""Twenty steps of `decant train` on the GPU: losses of the CPU, and killed and continued as if nothing had happened.

A small student of random weights on made-up rows; four runs of the program, the first two at once. Cost: four starts.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from shared.process.parent_watch import announced
from tools.own_process import own_command, own_environment

STEPS, KILLED_AFTER, BYTES, END = 20, 13, 256, "<end>"
RECIPE = """\
name: gpu-check
output_dir: {directory}/{name}
cache: {directory}/cache
heldout: {{fraction: 0.0}}
student: {{model: {directory}/student}}
stages:
  - name: kd
    losses: [{{name: forward_kl, weight: 0.9}}, {{name: cross_entropy, weight: 0.1}}]
    trainer: {{learning_rate: 1e-3, max_steps: {steps}, pack_tokens: 256, save_steps: 5, report_to: none}}
"""


def measure(*, dry_run: bool) -> dict[str, Any]:
    """Return the largest relative differences of losses: GPU against CPU, and continued against whole."""
    steps, killed = (4, 2) if dry_run else (STEPS, KILLED_AFTER)
    with tempfile.TemporaryDirectory(prefix="decant-gpu-check-") as name:
        directory = Path(name)
        _make_student(directory)
        cpu = _start(directory, "cpu", steps, {"CUDA_VISIBLE_DEVICES": ""})
        whole = _start(directory, "whole", steps)
        for process in (cpu, whole):
            _finish(process)
        broken = _start(directory, "again", steps, {"DECANT_FAILPOINT": f"train_step.after_write@{killed}"})
        broken.communicate()
        if broken.returncode >= 0:
            raise RuntimeError(f"the run was not killed after step {killed}; it ended with {broken.returncode}")
        _finish(_start(directory, "again", steps))
        losses = {run: _losses(directory / run) for run in ("cpu", "whole", "again")}
    return {
        "steps": len(losses["whole"]),
        "loss_first": losses["whole"][0],
        "loss_last": losses["whole"][-1],
        "gpu_over_cpu_difference": _difference(losses["whole"], losses["cpu"]),
        "continued_over_whole_difference": _difference(losses["again"], losses["whole"]),
    }


def _difference(found: list[float], expected: list[float]) -> float:
    return max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))


def _losses(run: Path) -> list[float]:
    lines = (run / "train/kd/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _start(directory: Path, name: str, steps: int, environment: dict[str, str] | None = None) -> Any:
    """Start a run of the program."""
    recipe = directory / f"{name}.yaml"
    recipe.write_text(RECIPE.format(directory=directory, name=name, steps=steps))
    settings = {**own_environment(), **(environment or {})}
    settings = {key: value for key, value in settings.items() if environment or key != "DECANT_FAILPOINT"}
    command = own_command("-m", "tools.cli", "train", str(recipe))
    with announced():  # it ends with this process, whose time is bounded
        return subprocess.Popen(  # noqa: S603 - our own interpreter
            command, env=settings, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )


def _finish(process: Any) -> None:
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {said.decode(errors='replace').strip()[-300:]}")


def _make_student(directory: Path) -> None:
    """Write a student with a tokenizer of bytes, and a cache of rows that it can be trained on."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate([*alphabet, END])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)
    student = directory / "student"
    tokenizer.save_pretrained(student)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=32, **sizes)
    AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(student)
    _make_cache(
        directory / "cache", {file.name: file.read_bytes() for file in student.glob("tokenizer*")}, len(tokenizer)
    )


def _make_cache(path: Path, tokenizer: dict[str, bytes], vocab: int) -> None:
    from shared.cache.writing.cache_writer import CacheWriter
    from shared.cache.writing.layer_writer import LayerWriter
    from shared.identity.identity import LayerIdentity, SequencesIdentity
    from shared.identity.weights_hash import tokenizer_hash
    from shared.keys import group_key, row_key
    from shared.parts.sequences import make_row
    from shared.payload.targets import SparseTargets

    rng, known = np.random.default_rng(0), tokenizer_hash(tokenizer["tokenizer.json"])
    identity = SequencesIdentity(tokenizer_hash=known, vocab_size=vocab)
    writer = CacheWriter.create_or_open(path, identity, tokenizer)
    rows, targets, k, length = [], [], 8, 48
    for number in range(64):
        group, labels = group_key(f"prompt {number}"), rng.integers(0, BYTES, length)
        ids = np.stack([rng.permutation(BYTES)[:k] for _ in range(length)]).astype(np.int32)
        logprobs = np.tile(np.log(0.9 * np.arange(k, 0, -1) / (k * (k + 1) / 2)), length).astype(np.float32)
        rows.append(
            make_row(
                row_key=row_key(group, {}, 0, None),
                group_key=group,
                source="made-up",
                prompt="p",
                response="r",
                reference=None,
                token_ids=np.concatenate([rng.integers(0, BYTES, 8), labels]).astype(np.int32),
                spans=[(8, 8 + length)],
                finish_reason="stop",
            )
        )
        counts = np.full(length, k, np.int32)
        tail = np.full((length, 1), np.log(0.1), np.float32)
        label_logprobs = np.full(length, -6.0, np.float32)
        targets.append(SparseTargets(counts, ids.ravel(), logprobs, label_logprobs, tail, (1.0,)))
    scored = LayerIdentity(teacher="made-up", weights_hash="", tokenizer_hash=known, vocab_size=vocab, mode="top", k=k)
    layer = LayerWriter.create_or_open(writer, None, scored, {})
    writer.write_sequences("part-00000000-000000", rows, {})
    layer.write("part-00000000-000000", [row.key for row in rows], targets, {})
