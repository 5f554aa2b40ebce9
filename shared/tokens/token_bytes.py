"""The bytes of every token of a `tokenizer.json`, read from the file itself.

Two kinds write every byte of a text, and so can be compared: byte-level ones (GPT-2, Llama 3, Qwen), whose pieces spell
each byte as a character of its own, and SentencePiece-like ones (Llama 2, Gemma, T5), whose pieces spell a space as
`▁` and, with byte fallback, a byte as `<0x0A>`. An added token stands for its text. Tokenizers that drop white space or
mark words (WordPiece) are refused. Cost: one pass over the vocabulary.

Shape letters: V ids.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import CacheError
from shared.tokens.tokenizer_file import check_token_ids

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of one tokenizer by id."""

    pieces: tuple[str | None, ...]
    """[V] how the file spells each token; None where an id is not used."""
    octets: tuple[bytes | None, ...]
    """[V] what it stands for; None as for pieces, and for the unknown token."""
    special: frozenset[int]
    """Ids of control tokens, whose text is no text."""

    def __len__(self) -> int:
        """V, one above the largest id."""
        return len(self.pieces)

    def num_bytes(self, token_ids: Sequence[int]) -> int:
        """Return the bytes of text that tokens stand for, control tokens left out.

        >>> Vocabulary(("Hi", "</s>"), (b"Hi", b"</s>"), frozenset({1})).num_bytes([0, 1])
        2
        """
        return sum(len(self.octets[i] or b"") for i in token_ids if i < len(self.octets) and i not in self.special)


def read_vocabulary(tokenizer_json: bytes, where: str = "the tokenizer") -> Vocabulary:
    """Read the bytes of every token.

    Args:
        tokenizer_json: content of the file.
        where: what to call it in messages.

    Raises:
        CacheError: it is no tokenizer, or of a kind whose tokens do not stand for bytes.
    """
    try:
        check_token_ids(tokenizer_json)
        document = json.loads(tokenizer_json)
        model = document["model"]
        listed = model["vocab"]
        unigram = [(i, str(entry[0])) for i, entry in enumerate(listed)] if isinstance(listed, list) else None
        pairs = [(int(i), str(piece)) for piece, i in listed.items()] if unigram is None else unigram
        added = [(int(one["id"]), str(one["content"]), bool(one["special"])) for one in document["added_tokens"] or ()]
        unknown = model.get("unk_token") if unigram is None else model.get("unk_id")
        size = 1 + max([*(i for i, _ in pairs), *(i for i, *_ in added)], default=-1)
        kinds = {kind for name in ("normalizer", "pre_tokenizer", "decoder") for kind in _kinds(document.get(name))}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"{where} is not a tokenizer.json ({type(error).__name__}: {error})") from None
    to_bytes = _byte_level if "ByteLevel" in kinds else _with_spaces if _spells_spaces(document, kinds) else None
    if to_bytes is None:
        raise CacheError(
            f"{where} is of kind {model.get('type')} without ByteLevel or {SPACE!r} for spaces, so its tokens do not "
            "stand for bytes; use a byte-level or a SentencePiece-like tokenizer"
        )
    pieces: list[str | None] = [None] * size
    octets: list[bytes | None] = [None] * size
    for i, piece in pairs:
        pieces[i], octets[i] = piece, None if unknown in (i, piece) and unknown is not None else to_bytes(piece)
    for i, content, _ in added:
        pieces[i], octets[i] = content, None if unknown in (i, content) and unknown is not None else content.encode()
    return Vocabulary(tuple(pieces), tuple(octets), frozenset(i for i, _, special in added if special))


def _kinds(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        yield str(part.get("type"))
        for name in ("normalizers", "pretokenizers", "decoders"):
            for inner in part.get(name) or ():
                yield from _kinds(inner)


def _spells_spaces(document: dict[str, Any], kinds: set[str]) -> bool:
    """Tell whether spaces are spelled `▁`: by Metaspace, or by a Replace of the normaliser."""
    return "Metaspace" in kinds or (
        "Replace" in kinds and SPACE in json.dumps(document.get("normalizer"), ensure_ascii=False)
    )


def _byte_level(piece: str) -> bytes:
    table = byte_of_character()
    return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()


def _with_spaces(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte.group(1), 16)]) if byte else piece.replace(SPACE, " ").encode()


@functools.cache
def byte_of_character() -> dict[str, int]:
    """Return the byte that each of the 256 characters of byte-level pieces spells; printable Latin-1 spells itself.

    >>> byte_of_character()["A"], byte_of_character()["\u0120"]
    (65, 32)
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
