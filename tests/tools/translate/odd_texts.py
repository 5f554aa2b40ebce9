"""Texts that tokenizers cut in different places: scripts, emoji, combining marks, line ends, digits, code."""

from __future__ import annotations

import random

_PIECES = (
    "The answer is ",
    "hello",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t\t",
    "    return first + second\n",
    "def add_apples(x):\n",
    "日本語のテキスト",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "Straße",
    "e\u0301\u0327",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea",
    "\u2581",
    "\ufffd",
    "\u00a0",
    "Ġ",
    "a" * 17,
    ".",
    "...",
    "<|",
    "[/INST]",
    "<0x0A>",
    "don't",
    "\x00",
    "\u202e",
)


def odd_text(seed: int) -> str:
    """Return a text of 1 to 12 odd pieces, or digits."""
    rng = random.Random(seed)
    pieces = [
        rng.choice(_PIECES) if rng.random() < 0.7 else str(rng.randrange(10 ** rng.randrange(1, 14))) for _ in range(12)
    ]
    return "".join(pieces[: rng.randrange(1, 13)])
