"""On which student token does a text begin that the teacher writes?

A teacher token v with bytes c lands on the first token of the student's tokenization of c. It is *closed* where that
token is shorter than c. Where it is all of c, what follows may still join it: the teacher writes "1", "2" and the
student "12". How often a student's token stays as it is where a teacher's token ends at its end is counted over the
rows of the cache (`BoundaryStability`); a token that was seen to be joined more than rarely is not given the mass of c,
which then joins the bucket. That is what keeps digits right.

Control tokens land on the control token of the same text, the teacher's end token on the student's. Cost: each
vocabulary is tokenized once, about 2 seconds for 150,000 tokens.

Shape letters: V teacher ids, W student ids.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.tokens.token_bytes import Vocabulary, read_vocabulary
from shared.tokens.tokenizer_file import plain_tokenizer

END = b"\xff<end of the answer>"
"""What the end token of either side stands for: no text has these bytes."""
UNKNOWN = b"\xfe<unknown>"
_LONE = re.compile("([\udc80-\udcff]+)")
"""Bytes that are no UTF-8, as `surrogateescape` decodes them."""
LEAST_STABILITY = 0.9
"""A token that stays as it is more rarely gets no mass from a text that ends with it."""


class VocabularyMap:
    """One teacher's vocabulary on one student's."""

    def __init__(self, teacher_json: bytes, student_json: bytes) -> None:
        """Read both tokenizers.

        Raises:
            CacheError: the tokens of one do not stand for bytes.
        """
        self.teacher = read_vocabulary(teacher_json, "the cache's tokenizer")
        self.student = read_vocabulary(student_json, "the student's tokenizer")
        self._encode = _plain_tokenizer(student_json)
        self._student_ids = _ids_of_bytes(self.student)
        self._controls = {str(self.student.pieces[i]): i for i in sorted(self.student.special)}
        self._longest = max(map(len, self._student_ids), default=0)
        self._first: dict[bytes, int] = {}
        teacher_octets = [
            b"" if i in self.teacher.special else octets or b"" for i, octets in enumerate(self.teacher.octets)
        ]
        ids = self._first_ids(teacher_octets)
        self._map_controls(ids)
        self._map_unreachable(ids, teacher_json, teacher_octets)
        self.ids: NDArray[np.int32] = ids
        """[V] the student's token that a teacher's token lands on; -1 where there is none."""
        lengths = np.array([len(octets) for octets in teacher_octets])
        landed = np.array([len(octets or b"") for octets in self.student.octets] + [0])[ids]
        self.is_all: NDArray[np.bool_] = (landed == lengths) & (lengths > 0)
        """[V] it is all of the teacher's token, so that what follows may join it."""

    def other_ids(self, vocab_size: int) -> NDArray[np.int32] | None:
        """Return [max(V, vocab_size)] the student's id of each of the teacher's where both have the same tokens; None
        where they do not.
        """
        size = max(len(self.teacher), vocab_size)
        ids = np.arange(size, dtype=np.int32)
        new = {piece: i for i, piece in enumerate(self.student.pieces) if piece is not None}
        told = {i: piece for i, piece in enumerate(self.teacher.pieces) if piece is not None}
        if len(self.teacher) != len(self.student) or set(told.values()) != new.keys() or len(told) != len(new):
            return None
        for i, piece in told.items():
            ids[i] = new[piece]
            is_control = i in self.teacher.special
            if is_control != (int(ids[i]) in self.student.special) or self.ids[i] not in (-1, ids[i]):
                return None
        return ids if len(np.unique(ids)) == size else None

    def first(self, text: bytes) -> int:
        """Return the student's token that a text begins with, with no prefix space of the tokenizer's own; -1 where
        there is none.
        """
        found = self._first.get(text)
        if found is None:
            found = self._first[text] = int(self._first_ids([text])[0])
        return found

    def student_ids(self, text: bytes) -> list[int] | None:
        """Return the student's tokens of a text, with no prefix space of its own; bytes that are no UTF-8 become tokens
        one by one. None where it has no token of such a byte.
        """
        ids: list[int] = []
        for piece in _LONE.split(text.decode(errors="surrogateescape")):
            lone = piece.encode(errors="surrogateescape") if _LONE.fullmatch(piece) else b""
            if any(bytes([byte]) not in self._student_ids for byte in lone):
                return None
            ids += [self._student_ids[bytes([byte])] for byte in lone]
            ids += [] if lone or not piece else self._encode.encode(piece, add_special_tokens=False).ids
        return ids

    def student_bytes(self, token_id: int) -> bytes:
        """Return what a student's token stands for."""
        return (self.student.octets[token_id] if token_id < len(self.student) else None) or UNKNOWN

    def teacher_bytes(self, token_id: int) -> bytes:
        """Return what a teacher's token stands for."""
        return (self.teacher.octets[token_id] if token_id < len(self.teacher) else None) or UNKNOWN

    def _first_ids(self, texts: list[bytes]) -> NDArray[np.int32]:
        """Return [n] the first token of each text; of one that is no UTF-8 the longest token that it begins with."""
        found = np.full(len(texts), -1, np.int32)
        whole = {i: text.decode() for i, text in enumerate(texts) if text and _is_utf8(text)}
        encoded = self._encode.encode_batch(list(whole.values()), add_special_tokens=False) if whole else []
        for i, one in zip(whole, encoded, strict=True):
            found[i] = self._checked(next(iter(one.ids), -1), texts[i])
        for i, text in enumerate(texts):
            if text and i not in whole:
                starts = (text[:n] for n in range(min(len(text), self._longest), 0, -1))
                found[i] = next((self._student_ids[start] for start in starts if start in self._student_ids), -1)
        return found

    def _checked(self, token_id: int, text: bytes) -> int:
        """Return a token that stands for the beginning of a text, or -1."""
        octets = self.student.octets[token_id] if token_id >= 0 and token_id not in self.student.special else None
        return token_id if octets and text.startswith(octets) else -1

    def _map_controls(self, ids: NDArray[np.int32]) -> None:
        for i in self.teacher.special:
            ids[i] = self._controls.get(str(self.teacher.pieces[i]), -1)

    def _map_unreachable(self, ids: NDArray[np.int32], teacher_json: bytes, octets: list[bytes]) -> None:
        """Let tokens that no text has (of several with equal bytes all but one) land on the student's token of the
        same spelling.
        """
        pieces = {piece: i for i, piece in enumerate(self.student.pieces) if piece is not None}
        texts = {i: text.decode() for i, text in enumerate(octets) if text and _is_utf8(text)}
        encoded = _plain_tokenizer(teacher_json).encode_batch(list(texts.values()), add_special_tokens=False)
        written = {i: one.ids for i, one in zip(texts, encoded, strict=True)}
        for i, text in enumerate(octets):
            same = pieces.get(str(self.teacher.pieces[i]))
            if text and same is not None and written.get(i) != [i] and self.student.octets[same] == text:
                ids[i] = same


@dataclass(slots=True)
class BoundaryStability:
    """How often a student's token stays as it is where a teacher's token ends at its end."""

    seen: NDArray[np.int64]
    """[W] how often a text had come to the end of the token and a teacher's token ended there."""
    kept: NDArray[np.int64]
    """[W] how often the student's own tokenization stopped there too."""
    share: NDArray[np.float64] = field(init=False)
    """[W] estimate of kept / seen, of the whole cache's where a token was never seen."""
    is_joined: NDArray[np.bool_] = field(init=False)
    """[W] it was seen to be joined by what follows."""

    def __post_init__(self) -> None:
        everywhere = self.kept.sum() / max(self.seen.sum(), 1) if self.seen.any() else 1.0
        share = (self.kept + everywhere) / (self.seen + 1)
        self.share = np.where(share >= LEAST_STABILITY, share, 0.0)
        self.is_joined = self.kept < self.seen


def _ids_of_bytes(vocabulary: Vocabulary) -> dict[bytes, int]:
    """Return the id of every byte string; of several, one that is not spelled as a byte."""
    found: dict[bytes, int] = {}
    for i in sorted(range(len(vocabulary)), key=lambda i: (len(vocabulary.pieces[i] or ""), -i), reverse=True):
        octets = vocabulary.octets[i]
        if octets and i not in vocabulary.special:
            found[octets] = i
    return found


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _plain_tokenizer(tokenizer_json: bytes) -> Any:
    """Return a tokenizer that adds no prefix space and no control token, and cuts nothing off."""
    document = json.loads(tokenizer_json)
    document["normalizer"] = _without_prefix(document.get("normalizer"), "normalizers")
    document["pre_tokenizer"] = _without_prefix(document.get("pre_tokenizer"), "pretokenizers")
    document["post_processor"] = None
    return plain_tokenizer(json.dumps(document).encode())


def _without_prefix(part: Any, inner: str) -> Any:
    """Return a normaliser or pre-tokenizer that puts no space before a text."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    if part.get("type") == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if part.get("type") == "ByteLevel":
        return {**part, "add_prefix_space": False}
    if inner in part:
        kept = [one for one in (_without_prefix(one, inner) for one in part[inner]) if one is not None]
        return {**part, inner: kept}
    return part
