"""The demo tokenizer and models on disk: what phase 1 and phase 2 rely on."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from tools.demo.domains import DOMAINS, stream

DATA = Path(__file__).resolve().parents[3] / "data" / "demo"
MODELS = ("teacher", "student")

transformers = pytest.importorskip("transformers")


def load_tokenizer(name: str):
    return transformers.AutoTokenizer.from_pretrained(DATA / name)


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_the_prompts_tokens_are_a_prefix_of_the_conversations_and_the_answer_survives_the_round_trip(domain):
    tokenizer = load_tokenizer("teacher")
    for item in islice(stream(domain, seed=77), 50):
        user = {"role": "user", "content": item.prompt}
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": item.answer}], return_dict=False)
        assert whole[: len(prompt)] == prompt
        assert tokenizer.decode(whole[len(prompt) :]) == item.answer + "<|im_end|>\n"
        assert len(whole) < 400


def test_digits_are_single_tokens_and_the_end_token_ends_a_turn():
    tokenizer = load_tokenizer("teacher")
    assert tokenizer.tokenize("x+1234") == ["x", "+", "1", "2", "3", "4"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert 1000 <= len(tokenizer) <= 1500


def test_teacher_and_student_share_one_tokenizer():
    assert (DATA / "teacher" / "tokenizer.json").read_bytes() == (DATA / "student" / "tokenizer.json").read_bytes()


def test_any_text_survives_the_tokenizer():
    tokenizer = load_tokenizer("teacher")
    text = "Grüße, 漢字 \U0001f600\n\n\t  if x:\r\n        return 007\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_both_models_load_in_bfloat16_and_the_student_is_at_least_four_times_smaller():
    torch = pytest.importorskip("torch")
    sizes = {}
    for name in MODELS:
        model = transformers.AutoModelForCausalLM.from_pretrained(DATA / name)
        assert model.dtype == torch.bfloat16
        assert model.generation_config.eos_token_id == load_tokenizer(name).eos_token_id
        sizes[name] = sum(weight.numel() for weight in model.parameters())
    assert sizes["teacher"] >= 4 * sizes["student"]


@pytest.mark.parametrize("name", MODELS)
def test_a_models_files_are_small_and_name_no_path_of_a_machine(name):
    files = {path.name: path for path in (DATA / name).iterdir()}
    assert set(files) >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert sum(path.stat().st_size for path in files.values()) <= 10 * 2**20
    for path in files.values():
        if path.suffix == ".json":
            assert "/" not in json.loads(path.read_text(encoding="utf-8")).get("_name_or_path", "")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "low", "high", "copies"), [("teacher", 75, 97, True), ("student", 2, 60, False)])
def test_the_teacher_solves_every_domain_and_the_student_leaves_room(name, low, high, copies):
    from tools.demo.scoring import task_scores

    model = transformers.AutoModelForCausalLM.from_pretrained(DATA / name, dtype="float32").eval()
    scores = task_scores(model, load_tokenizer(name))
    assert set(scores) == set(DOMAINS)
    assert (scores.pop("copy") > 95) == copies
    assert all(low < score <= high for score in scores.values()), scores
