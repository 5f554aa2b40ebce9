"""The Hugging Face hub: is it there, and how files become one commit, a directory a model. Its file system reads.

A commit appears whole or not at all, and large files that an interrupted one had sent are not sent again. A repository
that is not there is made private; whoever owns it makes it public. Cost: one commit per call; where no hub answers,
`SECONDS` once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shared.errors import CacheError, NamingError, first_line

SECONDS = 5.0
"""How long the hub is waited for; its library tries for a minute before it says that none is there."""
_silent: dict[str, bool] = {}
"""Whether a hub that was asked gave no answer."""
_PLACE = re.compile(r"hf://(datasets/|models/)?((?!datasets/|models/|spaces/)[^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")


class HubPlace(NamedTuple):
    """A place on the hub."""

    repo_type: str
    repo_id: str
    revision: str | None
    below: str
    """Folder in the repository, with a final slash; empty at its top."""


def hub_place(url: str) -> HubPlace:
    """Return what a URL names: `hf://datasets/org/name/demo` is folder `demo/` of the data set `org/name`.

    Raises:
        NamingError: it names no repository.
    """
    found = _PLACE.fullmatch(url.rstrip("/"))
    if not found:
        raise NamingError(f"{url} names no repository; expected hf://datasets/ORG/NAME")
    kind = "dataset" if found[1] == "datasets/" else "model"
    return HubPlace(kind, found[2], found[3], f"{found[4]}/" if found[4] else "")


def ask_hub(source: str | Path) -> str | None:
    """Where `source` is no directory and no hub answers, let the hub's library look into its local cache alone, and say
    so.

    >>> ask_hub(".")
    """
    if Path(source).expanduser().is_dir():
        return None
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE and constants.ENDPOINT not in _silent:
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            _silent[constants.ENDPOINT] = False
        except Exception:  # noqa: BLE001 - its library and network raise whatever they like; all of it means no answer
            _silent[constants.ENDPOINT] = constants.HF_HUB_OFFLINE = True
            os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that are started from here
    is_silent = _silent.get(constants.ENDPOINT, False)
    return f"{constants.ENDPOINT} does not answer, and it is not in the local cache" if is_silent else None


def commit_files(url: str, files: Sequence[tuple[str, Path | bytes]]) -> None:
    """Write files below a URL as one commit; the repository is made, private, where it is missing."""
    from huggingface_hub import CommitOperationAdd

    place, api = hub_place(url), _api()
    operations = [
        CommitOperationAdd(f"{place.below}{name}", data if isinstance(data, bytes) else str(data))
        for name, data in files
    ]
    api.create_repo(place.repo_id, repo_type=place.repo_type, private=True, exist_ok=True)
    api.create_commit(
        place.repo_id,
        operations,
        commit_message=f"Add {len(files)} files of a cache",
        repo_type=place.repo_type,
        revision=place.revision,
    )


def push_model(directory: Path, repo_id: str) -> str:
    """Write a model's directory, its card included, as one commit; return its address.

    Raises:
        CacheError: the hub does not take it, or huggingface_hub is missing.
    """
    api = _api()
    try:
        api.create_repo(repo_id, repo_type="model", private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=str(directory), commit_message="Add a student"))
    except Exception as error:  # noqa: BLE001 - what the hub refuses, and no answer, of which each version has its own
        said = first_line(error).split("?", 1)[0][:300]
        raise CacheError(
            f"{repo_id} cannot be pushed ({type(error).__name__}: {said}); check the network and `hf auth login`, then "
            "give the same command again"
        ) from None


def _api() -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise CacheError(
            f"hf:// needs huggingface_hub, which cannot be imported ({error}); install it with pip install "
            "'decant-kd[remote]'"
        ) from None
    return HfApi()
