"""The rows of a data set on a hub, by the readers that local files have, with their bounds.

Which files a split and a configuration have is told by `datasets`, from the card and the names at one revision. They
are fetched one after another, when their first row is wanted, into the store of the hub's library; what a limit never
reaches is not fetched. What a card says about reading beyond that (`sep` of csv and `sample_by` of txt are followed) is
refused: these readers would read other rows than it means.
Cost: one listing; the disk for the files that are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from shared.errors import PromptError, reason_of
from shared.recipe.base import quoted
from teacher_cache.prompts.files.prompt_directories import MAX_LISTED, SPLIT_WORDS, kind_of
from teacher_cache.prompts.files.prompt_readers import Numbered, read_file

READ = ("arrow", "csv", "json", "parquet", "text")
"""What `datasets` calls the kinds that are read."""
FREE_OPTIONS = ("features", "batch_size", "chunksize", "block_size", "use_threads", "keep_linebreaks", "memory_map")
"""Settings of its readers that change no text of a row."""


def read_hub(path: str, revision: str, split: str, config: str | None) -> Iterator[tuple[str, int, Any]]:
    """Yield (data set and file, line or row in it from 1, row).

    Raises:
        PromptError: it has no such split or configuration, its files are of no kind that is read, or cannot be read
            from some row on.
    """
    builder = _builder(path, revision, config)
    options = _options(path, type(builder).__module__.rsplit(".", 1)[-1], builder.config)
    told = {str(name): list(files) for name, files in (builder.config.data_files or {}).items()}
    for address in _of_split(path, told, split):
        name = _within(path, revision, address)
        for number, row in _read(path, revision, name, options):
            yield f"{path}/{name}", number, row


def _builder(path: str, revision: str, config: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(path, name=config, revision=revision)
    except Exception as error:  # the library raises whatever it likes; all of it means: not so
        is_away = isinstance(error, ConnectionError | TimeoutError)
        way_out = "start again" if is_away else "name what it has in `split` and `config`"
        raise PromptError(f"{path}: cannot be read ({reason_of(error)}); {way_out}") from error


def _options(path: str, module: str, config: Any) -> dict[str, Any]:
    """Return what `read_file` must know of a card's settings."""
    from datasets.builder import BuilderConfig

    way_out = "download it and write its rows as JSON lines"
    if module not in READ:
        raise PromptError(f"{path}: its files are read as '{module}', and of {', '.join(READ)} alone; {way_out}")
    general = {field.name for field in fields(BuilderConfig)}
    set_ = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in general and getattr(config, field.name) != field.default
    }
    options = {}
    if module == "csv":
        set_.pop("delimiter", None)  # which `sep` holds, too
        if "sep" in set_:
            options["separator"] = set_.pop("sep")
    if module == "text":
        by = set_.pop("sample_by", "line")
        options["by_line"] = by == "line"
        if by == "paragraph":
            set_["sample_by"] = by
    others = sorted(set(set_) - set(FREE_OPTIONS))
    if others:
        raise PromptError(f"{path}: its card sets {quoted(others, MAX_LISTED)}, which is not followed; {way_out}")
    return options


def _of_split(path: str, told: Mapping[str, list[str]], split: str) -> list[str]:
    """Return the files of a split, of several as `train+test`, or of `all`."""
    names = list(told) if split == "all" and "all" not in told else [split]
    if split not in told and "+" in split:
        names = [name.strip() for name in split.split("+")]
    names = [name if name in told else SPLIT_WORDS.get(name, name) for name in names]
    missing = next((name for name in names if name not in told), None)
    if missing is not None:
        raise PromptError(
            f"{path}: has no split '{missing}'; there are {quoted(list(told), MAX_LISTED)}: name one in `split`"
        )
    return [file for name in names for file in told[name]]


def _within(path: str, revision: str, address: str) -> str:
    """Return a file's name in the data set.

    Raises:
        PromptError: the card names a file that is elsewhere, on this machine say, or one of a kind that is not read.
    """
    found = re.fullmatch(rf"hf://datasets/(?:[^/@]+/)?[^/@]+@{re.escape(revision)}/(.+)", address)
    if not found:
        raise PromptError(
            f"{path}: its card names {address.split('?', 1)[0][:200]}, which is no file of it; download what is meant "
            "and name the files as `path`"
        )
    name = found[1]
    if kind_of(Path(name)) is None:
        raise PromptError(
            f"{path}/{name}: unknown kind of file; download it and write its rows as JSON lines, or name others with "
            "`config`"
        )
    return name


def _read(path: str, revision: str, name: str, options: Mapping[str, Any]) -> Iterator[Numbered]:
    from huggingface_hub import hf_hub_download

    try:
        local = Path(hf_hub_download(path, name, repo_type="dataset", revision=revision))
    except Exception as error:  # as above
        raise PromptError(f"{path}/{name}: cannot be fetched ({reason_of(error)}); start again") from error
    try:
        yield from read_file(local, **options)
    except PromptError as error:
        raise PromptError(str(error).replace(str(local), f"{path}/{name}")) from error
