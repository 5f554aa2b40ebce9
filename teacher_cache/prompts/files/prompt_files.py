"""Where a prompt source is: local files (one, a glob, a directory) or a data set on a hub, and what its content hash
is.

The hash stands in the request that names a job, so that a changed file is a new job and a moved one is not.
Cost: `content_hash` reads local files once, at disk speed; nothing is parsed.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from shared.errors import PromptError, refused
from shared.recipe.recipe import PromptSource
from shared.remote.hub import ask_hub
from teacher_cache.prompts.files.prompt_directories import (
    COMPRESSIONS,
    KINDS,
    LocalFiles,
    kind_of,
    of_directory,
    of_file,
    of_glob,
)

_BLOCK_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A data set on the hub at one revision."""

    path: str
    revision: str


def locate(source: PromptSource) -> LocalFiles | HubDataset:
    """Find a source's files, or its revision on the hub.

    Raises:
        PromptError: nothing is there or it cannot be read, its kind is not known, or it has no such split or
            configuration.
    """
    path = source.path
    exact = Path(path)
    if exact.is_file():
        chosen = of_file(exact, source)
    elif exact.is_dir():
        chosen = of_directory(exact, source)
    else:
        names = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - the pattern may be absolute
        found = [Path(name) for name in names if Path(name).is_file()]
        if not found and _looks_like_hub_id(path):
            return HubDataset(path, _hub_revision(path))
        if not found:
            raise PromptError(f"{path}: no such file; expected prompts of the source {source.source!r} there")
        chosen = of_glob(found, source)
    _require_one_kind(chosen.paths, source)
    for file in chosen.paths:
        with _read(file, source) as opened:
            opened.read(1)
    return chosen


def content_hash(source: PromptSource) -> str:
    """Return what the source holds as one string: xxh3-128 over its files' bytes, or the hub data set with its
    revision.
    """
    place = locate(source)
    if isinstance(place, HubDataset):
        return f"hub:{place.path}@{place.revision}"
    digest = xxhash.xxh3_128()
    for path in place.paths:
        with _read(path, source) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    return f"xxh3:{digest.hexdigest()}"


@contextmanager
def _read(path: Path, source: PromptSource) -> Iterator[BinaryIO]:
    """Open a file of a source.

    Raises:
        PromptError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        said = f"{path}: cannot be read ({refused(error)}); expected prompts of the source {source.source!r}"
        raise PromptError(said) from error


def _require_one_kind(files: Sequence[Path], source: PromptSource) -> None:
    kinds = {kind_of(file): file for file in reversed(files)}
    if None in kinds:
        raise PromptError(
            f"{kinds[None]}: unknown kind of file; expected one of {', '.join(KINDS)} (texts may end in "
            f"{', '.join(COMPRESSIONS)}, too)"
        )
    if len(kinds) > 1:
        named = ", ".join(sorted(str(kind) for kind in kinds))
        raise PromptError(
            f"{source.path}: files of several kinds ({named}); name those of one kind with a glob such as *.jsonl"
        )
    if "txt" in kinds and not source.of_text:
        raise PromptError(
            f"{files[0]}: a .txt file is one text, which `format: {source.format}` has no columns in; set "
            "`format: text`"
        )


def _looks_like_hub_id(path: str) -> bool:
    parts = path.split("/")
    return (
        len(parts) in (1, 2)
        and all(parts)
        and not path.startswith((".", "~"))
        and not any(c in path for c in "*?[")
        and kind_of(Path(path)) is None
    )


def _hub_revision(path: str) -> str:
    from huggingface_hub import HfApi

    silent = ask_hub(path)
    try:
        info: Any = HfApi().dataset_info(path, timeout=30)
    except Exception as error:  # offline, missing and forbidden all mean: not here
        reason = silent or type(error).__name__
        raise PromptError(
            f"{path}: neither a file nor a data set that the hub gives out ({reason}); expected one of both"
        ) from error
    return str(info.sha)
