"""A `tokenizer.json` on its way to its library, which allocates by the largest id that the file names, and cuts off or
fills up every text where somebody saved it so.

Cost: one search for long numbers, and one pass over the vocabulary where there are some.
"""

from __future__ import annotations

import json
import re
from typing import Any

from shared.errors import CacheError, first_line
from shared.schema import MAX_VOCAB_SIZE

_LONG_NUMBER = re.compile(rb"(?<![.\d])(\d{8,}|-\d+)(?![.\d])")
"""Ids of less than eight digits are below `MAX_VOCAB_SIZE`; digits behind a point are scores."""


def check_token_ids(tokenizer_json: bytes) -> None:
    """Refuse a file with an id that no vocabulary has.

    Raises:
        ValueError: the id is named.

    >>> check_token_ids(b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "</s>"}]}')
    """
    if _LONG_NUMBER.search(tokenizer_json) is None:
        return
    document = json.loads(tokenizer_json)
    vocab, added = document["model"]["vocab"], document.get("added_tokens") or ()
    ids = [*(vocab.values() if isinstance(vocab, dict) else ()), *(token["id"] for token in added)]
    beyond = next((i for i in ids if not 0 <= i < MAX_VOCAB_SIZE), None)
    if beyond is not None:
        raise ValueError(f"it has a token of id {beyond}, and ids from 0 to {MAX_VOCAB_SIZE - 1:,} are possible")


def num_ids(tokenizer: Any) -> int:
    """Return one above the largest id of a tokenizer of transformers or `tokenizers`; `len` counts tokens, which are
    fewer where ids are left out between them.
    """
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def plain_tokenizer(tokenizer_json: bytes, where: str = "the tokenizer") -> Any:
    """Return a `tokenizers.Tokenizer` that neither cuts texts off nor fills them up.

    Raises:
        CacheError: the library cannot read it.
    """
    from tokenizers import Tokenizer

    try:
        check_token_ids(tokenizer_json)
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    except Exception as error:  # the library raises nothing narrower
        raise CacheError(f"{where} is not for the installed `tokenizers`: {first_line(error)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
