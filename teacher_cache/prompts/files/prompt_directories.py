"""Which of the files at a path a source means: one split, one configuration, and nothing that is no data.

A directory is read as the hub reads it: its card (README.md) or the names of files and folders tell splits and
configurations apart, by the rules of the library `datasets`; what `Dataset.save_to_disk` wrote is read by its own
lists. Beyond that: files whose names tell no split are `train`; folders that are no split are configurations, of which
one must be named. A glob says itself which files are meant; only where its files' names tell several splits is one of
them taken. What is left out is said.
Cost: one listing of the directory.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.errors import PromptError, first_line
from shared.recipe.base import quoted
from shared.recipe.recipe import PromptSource
from shared.text import strict_json
from shared.text.file_endings import endings
from teacher_cache.prompts.files.missing_files import missing_files

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in names to the split that they tell, as `datasets` reads them."""
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
"""Files of the library `datasets` and of models."""
ABOUT_DATA = ("README", "LICENSE", "LICENCE", "NOTICE", "CITATION", "CHANGELOG")
"""How the names of files begin that are for people."""
MAX_LISTED = 5


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """Files that a source means, in the order in which they are read."""

    paths: Sequence[Path]
    note: str | None = None
    """What was left out, as a sentence."""


def kind_of(path: Path) -> str | None:
    """Return the kind of a file by its name: json (lines or a list), csv, txt, parquet, arrow; None where it is not
    read.
    """
    suffixes = endings(path)
    if suffixes and suffixes[-1] in COMPRESSIONS:
        inner = KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return inner if inner in ("json", "csv", "txt") else None
    return KINDS.get(suffixes[-1]) if suffixes else None


def of_file(path: Path, source: PromptSource) -> LocalFiles:
    """Return the one file, which has neither splits nor configurations.

    Raises:
        PromptError: the recipe names a split that the file's name does not tell, or a configuration.
    """
    if source.config is not None:
        raise PromptError(f"{path}: one file has no configurations; leave `config` out")
    if source.split != "train" and _split_in(path.name) != SPLIT_WORDS.get(source.split, source.split):
        raise PromptError(
            f"{path}: one file has no splits to choose from; leave `split` out, or name the file of '{source.split}'"
        )
    return LocalFiles([path])


def of_glob(files: Sequence[Path], source: PromptSource) -> LocalFiles:
    """Return the files of a glob, of one split where their names tell several.

    Raises:
        PromptError: none is of the split, or the recipe names a configuration.
    """
    if source.config is not None:
        raise PromptError(
            f"{source.path}: a glob names its files itself; leave `config` out and name the folder in the glob"
        )
    told: dict[str, list[Path]] = {}
    root = os.path.commonpath([file.parent for file in files])
    for file in files:
        names = file.relative_to(root).parts[::-1]
        told.setdefault(next((split for name in names if (split := _split_in(name))), "train"), []).append(file)
    one = len(told) == 1 and source.split == "train"
    chosen = LocalFiles(files) if one else _of_split(told, source)
    missing = missing_files(chosen.paths)
    note = _note(source, f"files that are missing by the others' names: {_listed(missing)}") if missing else None
    return LocalFiles(chosen.paths, _joined(chosen.note, note))


def of_directory(directory: Path, source: PromptSource) -> LocalFiles:
    """Return the files of one split and configuration of a directory.

    Raises:
        PromptError: there are none, or several configurations of which none is named.
    """
    if (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file():
        return _of_saved(directory, source)
    there, aside = _data_files(directory)
    if not there:
        raise PromptError(f"{directory}: the directory has no {', '.join(KINDS)} file; expected prompts there")
    if len({kind_of(path) for path in there}) > 1:
        return LocalFiles(there)  # which the caller refuses by the kinds
    card = _card_configs(directory)
    splits = _splits(directory, there, source, card)
    if not card:
        splits = _of_config(directory, splits, source)
    chosen = _of_split(splits, source)
    told = {path for files in splits.values() for path in files}
    left = [str(path.relative_to(directory)) for path in (*there, *aside) if path not in told]
    note = _note(source, f"files that are not read: {_listed(left)}") if left else None
    missing = missing_files(chosen.paths)
    if missing:
        raise PromptError(
            f"{directory}: of the files there some are missing by the others' names ({_listed(missing)}); get them, or "
            f"take what is there with a glob such as {_all_below(directory, chosen.paths)}"
        )
    return LocalFiles(chosen.paths, _joined(chosen.note, note))


def _data_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """List the data files below a directory and the files beside them, without hidden ones and those about the data."""
    seen = [
        path
        for path in sorted(directory.rglob("*"))
        if not any(part.startswith((".", "__")) for part in path.relative_to(directory).parts)
        and path.name not in NO_DATA
        and not path.name.upper().startswith(ABOUT_DATA)
        and path.is_file()
    ]
    found = [path for path in seen if kind_of(path) is not None]
    for suffix in (".json", ".txt"):  # descriptions lie beside data of another kind
        others = [path for path in found if suffix not in endings(path)]
        found = others or found
    return found, sorted(set(seen) - set(found))


def _card_configs(directory: Path) -> list[str]:
    """Return the configurations that the directory's card (README.md) describes; none without such a card."""
    readme = directory / "README.md"
    if not readme.is_file() or not _starts_with_metadata(readme):
        return []
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        return list(MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme, ignore_metadata_errors=True).data))
    except Exception as error:  # the library raises whatever its readers raise; all of it means unreadable
        raise PromptError(
            f"{readme}: its description of the data cannot be read ({first_line(error)[:300]}); mend it"
        ) from error


def _starts_with_metadata(readme: Path) -> bool:
    with readme.open("rb") as file:
        return file.read(3) == b"---"


def _splits(directory: Path, there: Sequence[Path], source: PromptSource, card: Sequence[str]) -> dict[str, list[Path]]:
    """Return split to files as `datasets` tells them apart: by the card's configuration, else by names."""
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns

    root = directory.resolve()
    try:
        if card:
            told = datasets.load_dataset_builder(str(root), name=source.config).config.data_files or {}
        else:
            base = glob.escape(str(root))
            told = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
        found = {
            str(split): {directory / Path(name).relative_to(root) for name in files} for split, files in told.items()
        }
    except Exception as error:  # as above
        which = f"; there are {_listed(card)}, name one with `config`" if card else "; name the files with a glob"
        raise PromptError(
            f"{directory}: its splits and configurations cannot be told ({first_line(error)[:300]}){which}"
        ) from error
    splits = {split: [path for path in there if path in files] for split, files in found.items()}
    known = {path for files in splits.values() for path in files}
    if not card and not splits.get("train"):
        splits["train"] = [path for path in there if path not in known]
    if not card:
        _move_told_in_capitals(splits, directory)
    return {split: files for split, files in splits.items() if files}


def _move_told_in_capitals(splits: dict[str, list[Path]], directory: Path) -> None:
    """Take files out of `train` whose names tell another split in capitals alone, which the library does not read."""
    for path in list(splits.get("train", ())):
        names = path.relative_to(directory).parts[::-1]
        told = next((split for name in names if (split := _split_in(name))), "train")
        if told != "train" and not any(word in SPLIT_WORDS for name in names for word in _words(name)):
            splits["train"].remove(path)
            splits.setdefault(told, []).append(path)


def _of_config(directory: Path, splits: Mapping[str, list[Path]], source: PromptSource) -> dict[str, list[Path]]:
    """Keep the files of one configuration: of one folder, folders that are named after splits aside."""
    folders: dict[str, dict[str, list[Path]]] = {}
    for split, files in splits.items():
        for file in files:
            parts = file.relative_to(directory).parts[:-1]
            folder = "/".join(part for part in parts if part != "data" and split not in (part, _split_in(part)))
            folders.setdefault(folder, {}).setdefault(split, []).append(file)
    if source.config is None and len(folders) > 1:
        raise PromptError(
            f"{directory}: has several configurations ({_listed(folder or '.' for folder in folders)}); name one with "
            f"`config`, or take all with a glob such as {_all_below(directory, next(iter(splits.values())))}"
        )
    wanted = next(iter(folders)) if source.config is None else "" if source.config == "." else source.config
    if wanted not in folders:
        raise PromptError(
            f"{directory}: has no configuration '{source.config}'; there are "
            f"{_listed(folder or '.' for folder in folders)}"
        )
    return folders[wanted]


def _of_saved(directory: Path, source: PromptSource) -> LocalFiles:
    """Return the files of what `save_to_disk` wrote, by its own lists: other .arrow files there are the library's
    cache.
    """
    if source.config is not None:
        raise PromptError(f"{directory}: a saved data set has no configurations; leave `config` out")
    try:
        names = ["train"]
        if (directory / "dataset_dict.json").is_file():
            names = [
                str(name)
                for name in strict_json.loads((directory / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            ]
            wanted = source.split if source.split in names else SPLIT_WORDS.get(source.split, source.split)
            if wanted not in names:
                raise PromptError(f"{directory}: has no split '{source.split}'; there are {_listed(names)}")
            directory = directory / wanted
        elif source.split != "train":
            raise PromptError(f"{directory}: one saved data set has no splits to choose from; leave `split` out")
        state = strict_json.loads((directory / "state.json").read_text(encoding="utf-8"))
        files = [directory / Path(str(entry["filename"])).name for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PromptError(
            f"{directory}: is no data set as `save_to_disk` writes it ({first_line(error)}); save it again"
        ) from error
    others = [name for name in names if name != directory.name] if len(names) > 1 else []
    return LocalFiles(
        files, _note(source, f"split '{directory.name}' is read, not {_listed(others)}") if others else None
    )


def _of_split(splits: Mapping[str, list[Path]], source: PromptSource) -> LocalFiles:
    wanted = source.split if source.split in splits else SPLIT_WORDS.get(source.split, source.split)
    if wanted not in splits:
        raise PromptError(
            f"{source.path}: has no split '{source.split}' as far as names tell; there are {_listed(splits)}: name "
            "one in `split`"
        )
    others = [split for split in splits if split != wanted]
    note = _note(source, f"split '{wanted}' is read, not {_listed(others)}") if others else None
    return LocalFiles(sorted(splits[wanted]), note)


def _note(source: PromptSource, what: str) -> str:
    return f"source {source.source}: {source.path}: {what}"


def _joined(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


def _split_in(name: str) -> str | None:
    """Return the split that a file's or folder's name tells: test-00000-of-00001.parquet -> test."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name)  # testA, myTestSet
    return next((SPLIT_WORDS[word] for word in _words(parted.lower()) if word in SPLIT_WORDS), None)


def _words(name: str) -> list[str]:
    return re.split(r"[-._ 0-9]+", name)


def _all_below(directory: Path, files: Sequence[Path]) -> str:
    """Return a glob for all files below a directory that end as the first of these does."""
    return f"{glob.escape(str(directory))}/**/*{files[0].suffix}"


def _listed(names: Iterable[str]) -> str:
    return quoted(list(names), MAX_LISTED)
