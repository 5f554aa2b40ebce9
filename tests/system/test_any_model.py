"""Models and prompts that the project has never seen, with a recipe alone, on a real vLLM: phase 1, phase 2,
evaluation, report.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared.cache.cache import Cache
from tests.system.program import ROOT, decant, write_lines
from tests.tiny_models import CHATML, TURN_END, make_llama, make_qwen3

pytestmark = pytest.mark.slow

QWEN_FILES = ROOT.parent / "shared" / "data" / "qwen_tokenizer"

COMMON = """\
heldout: {fraction: 0.2}
rows_per_part: 8
stages:
  - name: kd
    losses: [{name: forward_kl, weight: 0.9}, {name: cross_entropy, weight: 0.1}]
    trainer: {max_steps: 6, pack_tokens: 256}
evaluate: {models: [teacher, base, kd], engine: transformers}
"""

GIVEN_ANSWERS = """\
name: given
output_dir: run
teacher: {model: llama, max_model_len: 256}
prompts:
  - {source: prose, path: prose.jsonl, format: text}
  - {source: talks, path: talks.jsonl, format: messages}
capture: {k: 16}
cache: run/cache
student: {model: llama_student}
"""

OWN_ANSWERS = """\
name: own
output_dir: run
teacher: {model: teacher, max_model_len: 256}
prompts:
  - {source: first, path: first.jsonl, format: prompt_completion}
  - {source: second, path: second.jsonl, format: prompt_completion}
generate: {max_new_tokens: 12, samples_per_prompt: 3}
capture: {k: 16, mass: 0.999}
cache: run/cache
student: {model: student}
"""


def loads_in_vllm(model_dir: Path) -> dict:
    """Load a model directory in a plain vLLM, in a process of its own, and answer one chat."""
    program = f"""
import json
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM({str(model_dir)!r}, dtype="float32", enforce_eager=True, max_model_len=128)
    chat = [[{{"role": "user", "content": "Say hello"}}]]
    out = llm.chat(chat, SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)[0]
    tokenizer = llm.get_tokenizer()
    seen = {{"prompt_ids": list(out.prompt_token_ids), "eos": tokenizer.eos_token_id,
    "n": len(out.outputs[0].token_ids)}}
    print("RESULT " + json.dumps(seen))
"""
    script = model_dir.parent / "load.py"
    script.write_text(program)
    import os

    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


def check_run(place: Path) -> Cache:
    """Check report, cache and saved model of a finished run, and that the same command again computes nothing."""
    report = json.loads((place / "run" / "report.json").read_text())
    cache = Cache.open(place / "run" / "cache")
    assert report["cache"]["rows"] == len(cache) and report["cache"]["positions"] == sum(
        row.num_positions for row in cache
    )
    assert report["models"]["teacher"]["heldout"]["kl_nats"] < 2e-3
    assert report["models"]["kd"]["heldout"]["kl_nats"] < report["models"]["base"]["heldout"]["kl_nats"]
    assert len({row.row_key for row in cache}) == len(cache)
    again = decant(place, "teach", "recipe.yaml").stdout
    assert f"reused {len(cache):,} rows" in again and "scored 0" in again

    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = place / "run" / "train" / "kd" / "model"
    model = AutoModelForCausalLM.from_pretrained(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.eos_token == TURN_END and model.generation_config.eos_token_id in (
        tokenizer.eos_token_id, [tokenizer.eos_token_id],
    )  # fmt: skip
    chat = [{"role": "user", "content": "Say hello"}]
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    seen = loads_in_vllm(saved)
    assert seen["prompt_ids"] == list(expected) and seen["eos"] == tokenizer.eos_token_id and seen["n"] >= 1
    return cache


def test_llama_scores_given_texts_and_conversations(tmp_path):
    make_llama(tmp_path / "llama", seed=1)
    make_llama(tmp_path / "llama_student", seed=2, num_layers=1)
    texts = [f"Sort the numbers {i}, {i + 3} and {i * 2} first; then return the largest of them." for i in range(20)]
    write_lines(tmp_path / "prose.jsonl", ({"text": text} for text in texts))
    talks = [[
        {"role": "user", "content": f"How many are {i} and {i + 1}?"}, {"role": "assistant",
        "content": f"They are {2 * i + 1}."},
        {"role": "user", "content": "And one more?"}, {"role": "assistant", "content": f"Then {2 * i + 2}."},
    ] for i in range(20)]  # fmt: skip
    write_lines(tmp_path / "talks.jsonl", ({"messages": talk} for talk in talks))
    (tmp_path / "recipe.yaml").write_text(GIVEN_ANSWERS + COMMON)
    decant(tmp_path, "run", "recipe.yaml")
    cache = check_run(tmp_path)
    assert len(cache) == 40
    for row in cache:
        if row.source == "prose":
            assert row.spans.tolist() == [[1, len(row.token_ids)]]
        else:
            assert len(row.spans) == 2
            end = row.token_ids[row.spans[:, 1] - 1]
            assert (end == end[0]).all()


@pytest.mark.parametrize("vocabulary", ["filled", "qwen"])
def test_qwen_answers_prompts_of_two_sources_with_151936_entries(tmp_path, vocabulary):
    make_qwen3(tmp_path / "teacher", vocab_size=151_936, seed=3)
    make_qwen3(tmp_path / "student", vocab_size=151_936, seed=4, num_layers=1)
    if vocabulary == "qwen" and not QWEN_FILES.is_dir():
        pytest.skip(f"{QWEN_FILES} with the Qwen tokenizer's files is not here")
    if vocabulary == "qwen":
        give_qwen_tokenizer(tmp_path / "teacher")
    fill_vocabulary(tmp_path / "teacher", 151_936)
    for file in (tmp_path / "teacher").glob("*token*"):
        shutil.copy(file, tmp_path / "student")
    fill_vocabulary(tmp_path / "student", 151_936)
    prompts = [{"prompt": f"Anna has {i} tickets. How many?", "completion": f"{i}"} for i in range(8)]
    write_lines(tmp_path / "first.jsonl", prompts)
    write_lines(
        tmp_path / "second.jsonl",
        [prompts[3], *({"prompt": f"Ben has {i} disks. How many?", "completion": f"{i}"} for i in range(7))],
    )
    (tmp_path / "recipe.yaml").write_text(OWN_ANSWERS + COMMON)
    out = decant(tmp_path, "run", "recipe.yaml").stdout
    cache = check_run(tmp_path)
    assert len(cache) == 3 * 15, out
    assert sum(row.source == "first" for row in cache) == 24 and "second" in out
    groups: dict[bytes, list] = {}
    for row in cache:
        groups.setdefault(row.group_key, []).append(row.token_ids)
    assert len(groups) == 15 and all(len(rows) == 3 for rows in groups.values())
    assert any(not np.array_equal(rows[0], rows[1]) for rows in groups.values())


def give_qwen_tokenizer(directory: Path) -> None:
    """Replace a model's tokenizer by the real Qwen one, with ChatML tokens where Qwen has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE.from_file(str(QWEN_FILES / "vocab.json"), str(QWEN_FILES / "merges.txt")))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=TURN_END, pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(directory)


def fill_vocabulary(directory: Path, size: int) -> None:
    """Give every row of the head an entry in the tokenizer and random weights, so that whatever is
    sampled is a token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = directory / "tokenizer.json"
    document = json.loads(path.read_text())
    taken = {token["id"] for token in document["added_tokens"]} | set(document["model"]["vocab"].values())
    document["model"]["vocab"] |= {
        token["content"]: token["id"] for token in document["added_tokens"]
    }  # else they move behind
    document["model"]["vocab"] |= {f"filler{i}": i for i in range(size) if i not in taken}
    path.write_text(json.dumps(document))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == size
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows.copy_(torch.empty_like(rows).normal_(0.0, 0.3, generator=torch.Generator().manual_seed(7)))
        rows[tokenizer.eos_token_id] *= 2.0
    model.save_pretrained(directory)
