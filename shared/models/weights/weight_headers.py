"""The headers of a checkpoint's files: which tensors it holds, their shapes and stored types, none of their numbers.

Cost: the headers; for pickled weights (*.bin) their directory, read as weights only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

from shared.errors import ModelError, reason_of

MAX_INDEX_BYTES = 2**26

_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, EOFError, UnpicklingError)
"""What reading raises for weights that are none, or hold code."""


class Stored(NamedTuple):
    """One tensor of a file."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it, such as BF16 or I8; for pickled weights as torch does."""


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Return a checkpoint's tensors by name.

    Raises:
        ModelError: as for `weight_files`; a file cannot be read, or two files hold one tensor.
    """
    found: dict[str, Stored] = {}
    places: dict[str, Path] = {}
    for path in weight_files(directory):
        for name, stored in tensors_of(path):
            if name in found:
                raise ModelError(
                    f"{path.name} and {places[name].name} of {directory} both hold the tensor {name}, of which engines "
                    "would take either; remove the file that is not of this model, or save the model again"
                )
            found[name], places[name] = stored, path
    return found


def tensors_of(path: Path) -> Iterator[tuple[str, Stored]]:
    """Yield the tensors of one file by name.

    Raises:
        ModelError: it cannot be read.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".bin":
            for name, tensor in torch.load(path, map_location="meta", weights_only=True, mmap=True).items():
                yield name, Stored(tuple(tensor.shape), str(tensor.dtype))
            return
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(name)
                yield name, Stored(tuple(part.get_shape()), part.get_dtype())
    except (*_UNREADABLE, SafetensorError) as error:
        raise ModelError(
            f"{path}: cannot be read as weights ({reason_of(error, 200)}); copy or download the file again"
        ) from error


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold a model's weights, as transformers chooses them.

    Raises:
        ModelError: there are none, or the index names one that is not there.
    """
    for ending, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        whole, index = directory / f"{stem}{ending}", directory / f"{stem}{ending}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _indexed(index)
    if found := sorted(directory.glob("*.safetensors")):
        return found
    raise ModelError(
        f"{directory}: holds no weights; expected model.safetensors, or model.safetensors.index.json with its files"
    )


def _indexed(index: Path) -> list[Path]:
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"larger than {MAX_INDEX_BYTES:,} bytes")
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{index}: cannot be read as an index of weights ({error}); copy or download it again"
        ) from error
    for name in names:
        if Path(str(name)).name != name or not (index.parent / name).is_file():
            raise ModelError(f"{index} names the file {name!r}, which is not beside it; copy or download it again")
    return [index.parent / name for name in names]
