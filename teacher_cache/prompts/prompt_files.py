"""Where a prompt source is: local files (one, a glob, a directory) or a data set on a hub, and what its content hash
is.

The hash stands in the request that names a job, so that a changed file is a new job and a moved one is not.
Cost: `content_hash` reads local files once, at disk speed; nothing is parsed.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
KINDS = {".jsonl": "text", ".ndjson": "text", ".json": "text", ".parquet": "parquet", ".arrow": "arrow"}
"""Suffix to the `datasets` builder that reads it."""

_BLOCK_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """Files of one kind, in the order in which they are read."""

    paths: tuple[Path, ...]
    kind: str


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A data set on the hub at one revision."""

    path: str
    revision: str


def locate(source: PromptSource) -> LocalFiles | HubDataset:
    """Find a source's files, or its revision on the hub.

    Raises:
        PromptError: nothing is there, or its kind is not read.
    """
    path = source.path
    exact = Path(path)
    if exact.is_file():
        found = [exact]
    elif exact.is_dir():
        found = sorted(child for child in exact.rglob("*") if _kind(child) is not None and child.suffix != ".json")
        if not found:
            raise PromptError(f"{path}: the directory has no .jsonl, .parquet or .arrow file; expected prompts there")
    else:
        found = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())  # noqa: PTH207 - may be absolute
    if not found:
        if _looks_like_hub_id(path):
            return HubDataset(path, _hub_revision(path))
        raise PromptError(f"{path}: no such file; expected prompts of the source {source.source!r} there")
    kinds = {_kind(file) for file in found}
    if None in kinds:
        bad = next(file for file in found if _kind(file) is None)
        raise PromptError(
            f"{bad}: unknown kind of file; expected one of {', '.join(KINDS)} (JSON lines may end in .gz or .zst)"
        )
    if len(kinds) > 1:
        raise PromptError(
            f"{path}: files of several kinds ({', '.join(sorted(str(kind) for kind in kinds))}); expected one kind"
        )
    return LocalFiles(tuple(found), str(kinds.pop()))


def content_hash(source: PromptSource) -> str:
    """Return what the source holds as one string: xxh3-128 over its files' bytes, or the hub data set with its
    revision.
    """
    place = locate(source)
    if isinstance(place, HubDataset):
        return f"hub:{place.path}@{place.revision}"
    digest = xxhash.xxh3_128()
    for path in place.paths:
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
        except OSError as error:
            raise PromptError(
                f"{path}: cannot be read ({error.strerror}); expected prompts of the source {source.source!r}"
            ) from error
    return f"xxh3:{digest.hexdigest()}"


def _kind(path: Path) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        inner = suffixes[-2] if len(suffixes) > 1 else ""
        return "text" if KINDS.get(inner) == "text" else None
    return KINDS.get(path.suffix)


def _looks_like_hub_id(path: str) -> bool:
    parts = path.split("/")
    return (
        len(parts) in (1, 2)
        and all(parts)
        and not path.startswith((".", "~"))
        and not any(c in path for c in "*?[")
        and _kind(Path(path)) is None
    )


def _hub_revision(path: str) -> str:
    from huggingface_hub import HfApi

    try:
        info: Any = HfApi().dataset_info(path, timeout=30)
    except Exception as error:  # offline, missing and forbidden all mean: not here
        reason = type(error).__name__
        raise PromptError(
            f"{path}: neither a file nor a data set that the hub gives out ({reason}); expected one of both"
        ) from error
    return str(info.sha)
