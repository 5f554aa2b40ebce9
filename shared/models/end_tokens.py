"""Which tokens end an answer: one set for engines, evaluation, samples, benchmarks and what leaves with the model.

An answer ends at the end token of the chat template that its prompt was rendered with, at the tokenizer's eos, and at
what the model declares: `eos_token_id` of its generation_config.json, else of its config.json (as transformers and vLLM
read them). A base model's tokenizer often says `<|endoftext|>` where its chat template ends a turn with `<|im_end|>`:
without the template's token such an answer runs on into turns that the model makes up.
Cost: two small JSON files.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.errors import EngineError
from shared.models.config_file import read_config
from shared.tokens.tokenizer_file import num_ids


def end_token_ids(tokenizer: Any, declared: Iterable[int] = (), templates: Iterable[int] = ()) -> tuple[int, ...]:
    """Return the ids that end an answer, each once: of the templates, of the tokenizer, declared by the model.

    Ids that the tokenizer cannot produce never occur and are left out.

    Args:
        tokenizer: of transformers.
        declared: what the model's files say (`declared_end_ids`).
        templates: end tokens of chat templates; negative ones stand for none.

    >>> end_token_ids(tokenizer_with_eos_0_of_512, declared=(0, 9999), templates=(2,))  # doctest: +SKIP
    (2, 0)
    """
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    found = dict.fromkeys([*templates, *own, *declared])
    return tuple(token for token in found if 0 <= token < num_ids(tokenizer))


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of every token that the tokenizer marks as special; one that it has no id for is none."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset([*tokenizer.all_special_ids, *added]) - {None}


def declared_end_ids(model_dir: Path) -> tuple[int, ...]:
    """Return `eos_token_id` of a model's generation_config.json, or of its config.json where that says none.

    Raises:
        EngineError: a file cannot be read, or names what is no token id.
    """
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        document = read_config(path) if path.is_file() else {}
        text = document.get("text_config")
        value = document.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
        found = checked_ids(value, f"{path}: `eos_token_id`")
        if found:
            return found
    return ()


def checked_ids(value: Any, where: str) -> tuple[int, ...]:
    """Return an `eos_token_id` as a tuple; None and an empty list are no token.

    Raises:
        EngineError: it is neither a token id nor a list of them.
    """
    listed = value if isinstance(value, list | tuple) else [] if value is None else [value]
    wrong = [token for token in listed if isinstance(token, bool) or not isinstance(token, int) or token < 0]
    if wrong:
        raise EngineError(f"{where} is {value!r}; expected a token id, a list of token ids or null")
    return tuple(listed)
