"""In which form may a student be stored? Not quantised: packed numbers take no gradient. Nor in a larger model whose
text model transformers saves and does not open again. Cost: nothing.
"""

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


def refuse_unopened_text_model(source: object, config: Any) -> None:
    """Refuse a larger model whose text model would be trained, saved, and not opened as a language model again.

    transformers takes Mllama's and Emu3's out of them, saves them with a config of their own, and knows no language
    model of that config.

    Args:
        source: its directory or hub id.
        config: of transformers.

    Raises:
        TrainingError: the class is named.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as LANGUAGE_MODELS

    trained = LANGUAGE_MODELS.get(type(config), None)
    own = getattr(trained, "config_class", None)
    if own is not None and own is config.sub_configs.get("text_config") and own not in LANGUAGE_MODELS:
        raise TrainingError(
            f"'{source}' is trained as {trained.__name__}, and transformers does not open as a language model what it "
            f"saves of that (model_type {own.model_type}); choose another student"
        )
