"""Does a model's type leave a tokenizer as it is? For some types transformers puts the type's own normaliser and
pre-tokeniser over those of tokenizer.json, whatever the files say, so that whoever loads such a model and a tokenizer
that was not made for the type gets other tokens than the tokenizer makes.

Asked of transformers itself: the tokenizer is loaded as it would be from a directory with a model of that type, and
both encode a few texts.
Cost: the tokenizer is loaded once.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from shared.errors import IdentityError, ModelError
from shared.models.files import load_tokenizer
from shared.tokens.tokenizer_file import plain_tokenizer

PROBES = (
    "In 2024, 12345 x 3.14159 = ?",
    "don't we'll THEY'RE it's",
    "  two  spaces\n\n\tand a tab \r\n end ",
    "Ko\u0308ln, Köln, ﬁ ① Ⅷ ½",
    "東京 Москва مرحبا हिन्दी",
    "def f(x_1): return {'a': [x_1, -2]}  # --> !!",
    "👍🏽 ☀️ … “so” – 10€",
)
"""Where pre-tokenisers differ: digits, contractions, white space, normal forms, scripts, code, signs."""


def changed_by_type(files: Mapping[str, bytes], model_type: str) -> str | None:
    """Return a text that a model's directory of this type would encode otherwise than its tokenizer; None: no probe.

    Args:
        files: the tokenizer's by name, tokenizer.json among them.
        model_type: as config.json says it.
    """
    with tempfile.TemporaryDirectory(prefix="decant-tokenizer-") as directory:
        for name, data in files.items():
            if "/" not in name:
                Path(directory, name).write_bytes(data)
        Path(directory, "config.json").write_text(json.dumps({"model_type": model_type}))
        try:
            loaded = load_tokenizer(directory, trust_remote_code=False)
        except ModelError:  # a type of its own, or one that refuses an empty config: nothing is put over it here
            return None
    plain = plain_tokenizer(files["tokenizer.json"])
    for text in PROBES:
        if plain.encode(text, add_special_tokens=False).ids != loaded(text, add_special_tokens=False)["input_ids"]:
            return text
    return None


def require_unchanged(files: Mapping[str, bytes], model_type: str, name: str) -> None:
    """Refuse a student by name whose type changes the tokenizer of its cache; arguments as for `changed_by_type`.

    Raises:
        IdentityError: with a text that shows it.
    """
    text = changed_by_type(files, model_type)
    if text is not None:
        raise IdentityError(
            f"'{name}' is of the type {model_type}, for which transformers puts a pre-tokeniser of its own over any "
            f"tokenizer, so that {text!r} would be other tokens for whoever asks the student than in the cache; choose "
            "a student of another type, or train it from a cache in its own tokens (`decant cache translate`)"
        )
