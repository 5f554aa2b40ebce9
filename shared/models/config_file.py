"""A config of transformers as plain values, of bounded size and without that library. Cost: a small JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.errors import ModelError

MAX_CONFIG_BYTES = 2**24


def read_config(path: Path) -> dict[str, Any]:
    """Return a JSON file of a model's directory, of at most 16 MiB.

    Raises:
        ModelError: it cannot be read, or holds no object.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path}: larger than {MAX_CONFIG_BYTES:,} bytes; expected a model's config")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path}: cannot be read as a model's config ({error}); expected a model directory of transformers"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds no object; expected a model's config")
    return value
