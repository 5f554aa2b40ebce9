"""Is a model there, and can it be had: directories, hub ids and the names of tensors. Cost: headers of its files."""

from __future__ import annotations

import re
from pathlib import Path

from shared.errors import reason_of
from shared.identity.weights_hash import tokenizer_hash
from shared.recipe.base import closest
from shared.remote.hub import SECONDS, ask_hub
from tools.plan.preflight.preflight_asked import said

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)


def model_problem(name: str, revision: str | None, *, weights: bool, stated: bool) -> str | None:
    """Say why a model cannot be had, or None; `stated`: its sizes are enough, where no directory is meant."""
    directory = Path(name)
    if directory.is_dir():
        from teacher_cache.teacher.model_files import resolve_model

        found = next((sentence for _, sentence in said((), lambda: resolve_model(name, revision))), None)
        if found is None and weights and not any(directory.glob("*.safetensors")):
            return f"'{name}' has no *.safetensors; expected the directory of a model with its weights"
        return found
    if directory.exists():
        return f"'{name}' is a file; expected a model's directory or a hub id"
    if not HUB_ID.fullmatch(name):
        near = [path.name for path in directory.parent.iterdir()] if directory.parent.is_dir() else []
        return f"there is no directory '{name}'{closest(directory.name, sorted(near))}; expected a model's directory"
    return None if stated else _fetched(name, revision)


def hash_of_tokenizer(model: str, *, trusts: bool) -> str:
    """Return the hash of a model's tokenizer as transformers loads it; arguments and errors as `files_of_tokenizer`."""
    return tokenizer_hash(files_of_tokenizer(model, trusts=trusts)["tokenizer.json"])


def files_of_tokenizer(model: str, *, trusts: bool) -> dict[str, bytes]:
    """Return the files of a model's tokenizer as transformers loads it; `trusts`: its code may run.

    Raises:
        ModelError: it cannot be loaded.
    """
    from shared.models.files import load_fast_tokenizer
    from teacher_cache.teacher.model_files import resolve_model, tokenizer_files

    return tokenizer_files(load_fast_tokenizer(resolve_model(model).directory, trust_remote_code=trusts))


def _fetched(name: str, revision: str | None) -> str | None:
    from huggingface_hub import hf_hub_download

    silent = ask_hub(name)
    try:
        hf_hub_download(name, "config.json", revision=revision, etag_timeout=SECONDS)
    except Exception as error:  # noqa: BLE001 - offline, missing, forbidden, no valid id: none of them gives a model
        reason = silent or reason_of(error, 160)
        return (
            f"'{name}' is neither a directory nor a hub id that can be fetched ({reason}); correct it, or download the "
            "model and name its directory"
        )
    return None
