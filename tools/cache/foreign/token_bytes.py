"""Which bytes a token stands for, and which token stands for bytes: the tokenizer's own map, both ways.

Byte-level vocabularies spell every byte as one of 256 letters (Radford et al., GPT-2); vocabularies with byte fallback
spell a space as U+2581 and lone bytes as <0x0A>. Added tokens stand for their own text. Cost: one pass over the
vocabulary.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from shared.errors import CacheError

_LONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer_json: bytes) -> list[bytes | None]:
    """Return the bytes of each id; None for ids that the vocabulary does not have.

    Raises:
        CacheError: the vocabulary is of a kind whose tokens have no bytes of their own.
    """
    document: dict[str, Any] = json.loads(tokenizer_json)
    decoder = json.dumps(document.get("decoder"))
    if '"ByteLevel"' in decoder:
        spell = _letters_bytes
    elif '"ByteFallback"' in decoder or "\\u2581" in decoder or '"Metaspace"' in decoder:
        spell = _fallback_bytes
    else:
        raise CacheError(
            "the tokenizer is neither byte-level nor with byte fallback, so texts cannot be told apart as tokens; ask "
            "the server for token ids (vLLM: return_tokens_as_token_ids)"
        )
    vocabulary = document["model"]["vocab"]
    pairs = list(vocabulary.items()) if isinstance(vocabulary, dict) else [(v[0], i) for i, v in enumerate(vocabulary)]
    added = {token["id"]: token["content"].encode() for token in document.get("added_tokens", ())}
    found: list[bytes | None] = [None] * (max([i for _, i in pairs] + list(added), default=-1) + 1)
    for text, token_id in pairs:
        try:
            found[token_id] = spell(text)
        except KeyError:
            found[token_id] = text.encode()
    for token_id, content in added.items():
        found[token_id] = content
    return found


class TokenIds:
    """The id of a token by its bytes; of two tokens with the same bytes, the ordinary one, then the lower."""

    def __init__(self, of_id: list[bytes | None]) -> None:
        """Take the bytes of each id."""
        self._ids: dict[bytes, int] = {}
        for token_id, spelled in enumerate(of_id):
            if spelled is not None:
                self._ids.setdefault(spelled, token_id)

    def of(self, spelled: bytes) -> int | None:
        """Return the id of the token that stands for these bytes; None where there is none."""
        return self._ids.get(spelled)


@cache
def _byte_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary spells: itself if printable, else from 256 on."""
    itself = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in itself}
    others = [byte for byte in range(256) if byte not in itself]
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}


def _letters_bytes(text: str) -> bytes:
    letters = _byte_letters()
    return bytes(letters[letter] for letter in text)


def _fallback_bytes(text: str) -> bytes:
    lone = _LONE_BYTE.fullmatch(text)
    return bytes([int(lone[1], 16)]) if lone else text.replace("\u2581", " ").encode()
