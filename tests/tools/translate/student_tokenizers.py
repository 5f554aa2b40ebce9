"""Tokenizers of public families' kinds, trained on the spot in a moment: byte-level BPE and SentencePiece-like ones.

Digits are what the families do differently: one token each, up to three in one, or as many as merges make.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.tiny_models import training_text

EOS, BOS, PAD = "</s>", "<s>", "<pad>"
INST = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + '</s>' }}{%- else %}{{- m.content }}{%- endif %}"
    "{%- endfor %}"
)
TURNS = (
    "{{- bos_token }}{%- for m in messages %}{{- '<turn>' + m.role + '\n' + m.content }}"
    "{%- if m.role == 'assistant' %}{{- '</s>' }}{%- else %}{{- '</turn>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<turn>assistant\n' }}{%- endif %}"
)
KINDS = ("single digits", "three digits", "joined digits", "prefix space", "spaces", "unigram")


def student_tokenizer(kind: str, vocab_size: int = 600, texts: list[str] | None = None, seed: int = 0) -> Any:
    """Return a `tokenizers.Tokenizer` of a kind, trained on a random part of the texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    rng = random.Random(seed)
    texts = texts or [*training_text(), *(f"{rng.randrange(10**6)} and {rng.randrange(2000)}" for _ in range(400))]
    texts = [text for text in texts if rng.random() < 0.7] or texts
    special = [PAD, BOS, EOS, "<turn>", "</turn>"]
    spells_bytes = [f"<0x{b:02X}>" for b in range(256)]
    if kind == "unigram":
        inner = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    else:
        byte_level = kind.endswith("digits")
        inner = Tokenizer(
            models.BPE() if byte_level else models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
        )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special if byte_level else [*special, "<unk>", *spells_bytes],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_level else [],
            show_progress=False,
        )
    if kind.endswith("digits"):
        split = {"single": r"\d", "three": r"\d{1,3}", "joined": r"\d+"}[kind.split()[0]]
        digits = pre_tokenizers.Split(Regex(split), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        inner.decoder = decoders.ByteLevel()
    elif kind == "unigram":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        inner.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        spaces = normalizers.Replace(" ", "\u2581")
        prefix = kind == "prefix space"
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
        inner.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
        inner.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
            + ([decoders.Strip(" ", 1, 0)] if prefix else [])
        )
    inner.train_from_iterator(texts, trainer)
    return _with_byte_pieces(inner, special) if kind == "unigram" else _unsplit(inner, kind)


def permuted(tokenizer_json: str, seed: int = 0) -> str:
    """Return a tokenizer.json whose tokens have other ids and nothing else."""
    document = json.loads(tokenizer_json)
    vocab = document["model"]["vocab"]
    ids = sorted(vocab.values())
    shuffled = ids[:]
    random.Random(seed).shuffle(shuffled)
    new = dict(zip(ids, shuffled, strict=True))
    document["model"]["vocab"] = {piece: new[i] for piece, i in vocab.items()}
    for token in document["added_tokens"]:
        token["id"] = new.get(token["id"], token["id"])
    return json.dumps(document)


def save(inner: Any, directory: Path, chat_template: str | None = TURNS, eos: str = EOS, **names: str) -> Path:
    """Save a tokenizer as transformers loads it."""
    from transformers import PreTrainedTokenizerFast

    names = names or {"bos_token": BOS, "pad_token": PAD}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, clean_up_tokenization_spaces=False, **names
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return directory


def _unsplit(inner: Any, kind: str) -> Any:
    """Return the tokenizer as it is used: SentencePiece BPE merges over whole texts, training is by word."""
    if kind.endswith("digits"):
        return inner
    from tokenizers import Tokenizer

    document = json.loads(inner.to_str())
    document["pre_tokenizer"] = None
    pieces = [token for token in document["added_tokens"] if token["content"].startswith("<0x")]
    document["added_tokens"] = [token for token in document["added_tokens"] if token not in pieces]
    return Tokenizer.from_str(json.dumps(document))


def _with_byte_pieces(inner: Any, special: list[str]) -> Any:
    """Give a trained Unigram its unknown token and a piece for every byte."""
    from tokenizers import Tokenizer

    document = json.loads(inner.to_str())
    model = document["model"]
    pieces = [*model["vocab"], ["<unk>", -50.0], *([f"<0x{b:02X}>", -30.0] for b in range(256))]
    model |= {"vocab": pieces, "unk_id": len(model["vocab"]), "byte_fallback": True}
    decoder = [{"type": "ByteFallback"}, document["decoder"]]
    document["decoder"] = {"type": "Sequence", "decoders": decoder}
    return Tokenizer.from_str(json.dumps(document))
