"""In which form may a student's weights be stored? Not quantised: packed numbers take no gradient. Cost: nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.errors import TrainingError

UNPACKED = ("mxfp4",)
"""Schemes that transformers unpacks where it loads a model to train it."""


def refuse_quantised(source: object, config: Mapping[str, Any]) -> None:
    """Refuse a student that is stored quantised, whatever would be trained of it.

    Args:
        source: its directory or hub id.
        config: its config.json.

    Raises:
        TrainingError: with what to take instead.

    >>> refuse_quantised("Qwen3-0.6B", {"model_type": "qwen3"})
    """
    text = config.get("text_config")
    parts = (config, text if isinstance(text, Mapping) else {})
    found = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    scheme = found.get("quant_method") if isinstance(found, Mapping) else None
    if found and scheme not in UNPACKED:
        raise TrainingError(
            f"'{source}' is stored quantised ({scheme or 'unnamed'}), and such weights cannot be trained; take the "
            "model that it was made from (adapter: qlora holds it in 4 bits while it trains)"
        )
