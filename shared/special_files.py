"""A directory of files that libraries open by themselves may hold no pipe, device or socket, and no text without end.

A library waits for a pipe's writer and reads a device without end, and none of them looks first; texts (a config, a
tokenizer, a template) it reads in one piece, however long. Links are followed where a model is read. Where its files
are copied into something that others get (a cache's tokenizer, an export), a link may lead to a file of the same
directory or to one that a hub's store holds, which is made of links (`snapshots/REVISION/config.json ->
../../blobs/HASH`): a blob is named by its content and was public or the user's choice; any other file of this machine
is nobody's to copy. Cost: one or two listings.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable
from pathlib import Path

from shared.errors import ModelError

SPECIAL_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


MAX_TEXT_BYTES = 2**28
"""Of a file that libraries read whole; tokenizers of 260,000 tokens take 35 MB."""
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".yaml")
_TEMPLATES = "additional_chat_templates"


def refuse_special_files(directory: str | Path) -> None:
    """Refuse a model's, tokenizer's or adapter's directory that holds something else than files and directories, or a
    text of more than `MAX_TEXT_BYTES`.

    What is no directory (a hub id) passes.

    Raises:
        ModelError: the first such file is named.
    """
    for path in (*_entries(Path(directory)), *_entries(Path(directory, _TEMPLATES))):
        try:
            status = path.stat()
        except OSError:  # a link that leads nowhere
            continue
        found = SPECIAL_KINDS.get(stat.S_IFMT(status.st_mode))
        if found is not None:
            raise ModelError(f"{path} is {found} where a model has a regular file; put the file itself there")
        if stat.S_ISREG(status.st_mode) and path.name.endswith(_TEXTS) and status.st_size > MAX_TEXT_BYTES:
            raise ModelError(
                f"{path} has {status.st_size:,} bytes, and a text of a model has at most {MAX_TEXT_BYTES:,}; put the "
                "model's own file there"
            )


def refuse_links_outside(directory: Path, paths: Iterable[Path]) -> None:
    """Refuse files of a directory that are to be copied and are links to somewhere else on this machine.

    Raises:
        ModelError: the first such link is named.
    """
    root = directory.resolve()
    for path in paths:
        if not path.is_symlink():
            continue
        try:
            target = path.resolve()
        except (OSError, RuntimeError):  # links in a circle
            target = None
        if target is None or not (target.is_relative_to(root) or _is_blob(target)):
            raise ModelError(
                f"{path} is a link to {path.readlink()}, outside of {directory}, and would be copied with it; put the "
                "file itself there"
            )


_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def _is_blob(path: Path) -> bool:
    """Tell whether a path is a file that a hub's store holds by the hash of its content."""
    *_, repository, folder, name = ("", "", *path.parts)
    return folder == "blobs" and bool(_REPOSITORY.fullmatch(repository) and _BLOB.fullmatch(name))


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir()) if directory.is_dir() else []
    except (OSError, ValueError):  # not readable, or no path: whoever loads it says so
        return []
