"""An adapter from disk, put on a model or merged into it, only where all of it fits. Cost: the adapter's size."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from shared.errors import ModelError
from shared.models.load_report import Gaps, loading
from shared.special_files import refuse_special_files

ADAPTER = "a directory with adapter_config.json and adapter_model.safetensors"


def refuse_adapter_inside(directory: str | Path, name: str) -> None:
    """Refuse a model's directory that holds an adapter: transformers would put it on in silence, and vLLM would not.

    Raises:
        ModelError: it holds adapter_config.json.
    """
    if (Path(directory) / "adapter_config.json").is_file():
        raise ModelError(
            f"{name} holds adapter_config.json, so it is an adapter or has one on top; expected a model alone: merge "
            "the adapter into it, or move it to a directory of its own (a teacher's goes under `teacher.adapter`)"
        )


def merge_adapter(model: Any, directory: str | Path) -> Any:
    """Return a model with an adapter merged into its weights.

    Raises:
        ModelError: as `add_saved_adapter`, or it is of a kind that cannot be merged.
    """
    with loading(f"the adapter '{directory}'", ADAPTER):
        return add_saved_adapter(model, directory).merge_and_unload(safe_merge=True)


def add_saved_adapter(model: Any, directory: str | Path) -> Any:
    """Wrap a model with an adapter from disk, all of whose tensors have a layer, and all of whose layers have their
    tensors.

    Raises:
        ModelError: it cannot be loaded, or does not fit the model.
    """
    from peft import PeftModel

    refuse_special_files(directory)
    name = f"the adapter '{directory}'"
    with loading(name, ADAPTER), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what does not fit is refused below
        if not (Path(directory) / "adapter_config.json").is_file():
            raise FileNotFoundError("no adapter_config.json there")
        wrapped = PeftModel.from_pretrained(model, str(directory))
        report = wrapped.load_adapter(str(directory), "default")  # again, since only this returns what fitted
    Gaps(missing=report.missing_keys, unexpected=report.unexpected_keys).refuse(name, type(model).__name__)
    return wrapped
