"""A config of transformers as plain values, of bounded size and without that library. Cost: a small JSON file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import ModelError, refused

MAX_CONFIG_BYTES = 2**24
MOST_PARTS = 2**14
"""Layers, blocks or experts of a model; the largest have a few hundred of each."""
MOST_EXPERTS = 2**17
"""Experts of all layers together."""
_PARTS = re.compile(r"layer|block|expert|depth")
_EXPERTS = re.compile(r"(num|n)(_\w+)?_experts")


def read_config(path: Path) -> dict[str, Any]:
    """Return a JSON file of a model's directory, of at most 16 MiB.

    Raises:
        ModelError: it cannot be read, or holds no object.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path}: larger than {MAX_CONFIG_BYTES:,} bytes; expected a model's config")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if path.name == "config.json" and path.with_name("adapter_config.json").is_file():
            raise ModelError(
                f"{path.parent}: holds an adapter without its model; name the model's directory (a teacher's adapter "
                "goes under `teacher.adapter`; of a student's, merge it into the model first)"
            ) from error
        raise ModelError(f"{path}: cannot be read as a model's config ({refused(error)})") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read as a model's config ({refused(error)})") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: cannot be read as a model's config ({error}); expected a model directory of transformers"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds no object; expected a model's config")
    if path.name == "config.json":
        refuse_endless(value, str(path))
    return value


def check_config(source: str | Path) -> None:
    """Refuse a directory whose config.json no library should be given; what is no directory passes.

    Raises:
        ModelError: as for `read_config`.
    """
    path = Path(source, "config.json")
    if path.is_file():
        read_config(path)


def refuse_endless(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config that asks for more parts than any model has: a library makes them one by one, on no device, too.

    Raises:
        ModelError: the number is named.
    """
    waiting: list[Mapping[str, Any]] = [config]
    layers, experts = 1, 1
    while waiting:
        for key, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            if type(value) is not int or not _PARTS.search(key):
                continue
            if value > MOST_PARTS:
                raise ModelError(
                    f"{where}: `{key[:60]}` is {str(value)[:20]}, and a model has at most {MOST_PARTS:,}; correct the "
                    "config"
                )
            if _EXPERTS.fullmatch(key):
                experts = max(experts, value)
            elif "layer" in key:
                layers = max(layers, value)
    if layers * experts > MOST_EXPERTS:
        raise ModelError(
            f"{where}: says {experts:,} experts in {layers:,} layers, and a model has at most {MOST_EXPERTS:,} in all; "
            "correct the config"
        )
