"""A model's config and tokenizer, from a directory or a hub, without its weights. Cost: small files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from shared.errors import ModelError
from shared.models.config_file import check_config, refuse_endless
from shared.models.large_imports import import_transformers
from shared.models.load_report import loading
from shared.remote.hub import ask_hub
from shared.special_files import refuse_special_files
from shared.tokens.tokenizer_file import check_token_ids

CONFIG = "a directory with config.json, or a hub id that can be fetched"


def load_config(source: str | Path, *, what: str, trust_remote_code: bool, revision: str | None = None) -> Any:
    """Return the transformers config of a model directory or hub id.

    Raises:
        ModelError: there is none, or it is of a type that transformers does not know.
    """
    import_transformers()
    from transformers import AutoConfig, PreTrainedConfig

    ask_hub(source)
    refuse_special_files(source)
    with loading(f"the config of {what} '{source}'", CONFIG):
        found, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        refuse_endless(found, f"the config of {what} '{source}'")
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)


def load_fast_tokenizer(source: str | Path, *, trust_remote_code: bool) -> Any:
    """Return a tokenizer that has a tokenizer.json, which spans and identities need.

    Raises:
        ModelError: as for `load_tokenizer`, or it has none.
    """
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{source}: the tokenizer has no tokenizer.json form; expected a fast tokenizer")
    return tokenizer


def load_tokenizer(source: str | Path, *, trust_remote_code: bool, revision: str | None = None) -> Any:
    """Return the transformers tokenizer of a directory or hub id.

    Raises:
        ModelError: there is none, or its code would have to be run and `trust_remote_code` is false.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time: a thread pool only costs hand-overs
    import_transformers()
    from transformers import AutoTokenizer

    ask_hub(source)
    refuse_special_files(source)
    check_config(source)  # which transformers reads, too
    with loading(f"{source}: the tokenizer", expected="whole files of a tokenizer and of a config there"):
        file = Path(source, "tokenizer.json")
        if file.is_file():
            check_token_ids(file.read_bytes())
        found = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    if len(found) <= len(found.added_tokens_decoder):  # transformers makes one of the model's type from nothing
        raise ModelError(
            f"{source}: holds no tokenizer; copy tokenizer.json and tokenizer_config.json of the model to it"
        )
    return found
