"""Models with other tokens for the translation bench: a tokenizer trained on the demo's texts, and a model of the demo
whose embeddings are taken over token by token.

A new token begins as the mean of what the old tokenizer makes of its text. Digits: the demo's teacher writes each as a
token of its own; these students join up to three, or as many as their merges make. For the other direction there is a
teacher that joins up to three digits.
Cost: seconds; the teacher about 10 minutes on one core.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.models.weights.loading import load_causal_lm
from shared.tokens.token_bytes import SPACE, read_vocabulary
from tools.bench.students.seeds import run_module
from tools.demo import tokenizer as demo_tokenizer

PAD, START, END = "<pad>", "<s>", "</s>"
TEMPLATE = (
    "{{- bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}</s>"
    "{% else %}<turn>{{ message['content'] }}</turn>{% endif %}{% endfor %}"
)
KINDS = ("three digits", "prefix space", "unigram")
"""byte-level like Llama 3, SentencePiece BPE like Llama 2, Unigram like T5."""


def train_tokenizer(kind: str, texts: Sequence[str], vocab_size: int) -> Any:
    """Train a tokenizer of a kind; returns a transformers fast tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, START, END, "<turn>", "</turn>"]
    trainer: Any
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "three digits":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])  # fmt: skip
        inner.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "prefix space":
        inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))  # noqa: S106 - a token
        inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        inner.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
        inner.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[*special, "<unk>", *spelled], show_progress=False
        )
    else:
        inner = Tokenizer(models.Unigram())
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        inner.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(vocab_size=vocab_size - 257, special_tokens=special, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    document = json.loads(inner.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] not in spelled]
    if kind == "unigram":
        model, decoder = document["model"], document["decoder"]
        model["unk_id"], model["byte_fallback"] = len(model["vocab"]), True
        model["vocab"] += [["<unk>", -50.0], *([piece, -30.0] for piece in spelled)]
        document["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, decoder]}
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)), bos_token=START, eos_token=END, pad_token=PAD
    )
    found.chat_template = TEMPLATE
    return found


def with_tokenizer(base: Path, tokenizer: Any, out: Path) -> None:
    """Save a model with another tokenizer's embeddings; control tokens of the same name keep theirs."""
    import torch
    from transformers import AutoTokenizer

    model = load_causal_lm(base, what="the model", trust_remote_code=False, dtype=torch.float32)
    old = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    vocabulary = read_vocabulary(tokenizer.backend_tokenizer.to_str().encode())
    before = model.get_input_embeddings().weight.detach().clone()
    rows = before.mean(0).repeat(len(vocabulary), 1)
    for token, octets in enumerate(vocabulary.octets):
        text = None if octets is None or token in vocabulary.special else octets.decode(errors="ignore")
        same = old.get_vocab().get(tokenizer.convert_ids_to_tokens(token)) if token in vocabulary.special else None
        ids = old(text, add_special_tokens=False)["input_ids"] if text else [same] if same is not None else []
        rows[token] = before[ids].mean(0) if ids else rows[token]
    rows[tokenizer.eos_token_id] = before[old.eos_token_id]
    model.resize_token_embeddings(len(vocabulary))
    model.get_input_embeddings().weight.data.copy_(rows)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def joining_teacher(teacher: Path, out: Path) -> Path:
    """Return the directory of the demo's teacher with tokens of up to three digits, whose last phase it was trained
    again with; made where it is not there.
    """
    if not (out / "teacher/model.safetensors").exists():
        with_tokenizer(teacher, demo_tokenizer.train_tokenizer(digits=3), out / "start")
        start = str(out / "start")
        words = ("--only", "teacher", "--start", start, "--tokenizer", start)
        run_module("tools.demo.train_models", str(out), *words)
    return out / "teacher"
