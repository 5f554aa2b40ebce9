"""Which part of a causal language model makes the states that its head reads. Cost: looking at names."""

from __future__ import annotations

from typing import Any


def find_body(model: Any) -> Any | None:
    """Return the part of a causal language model below its head, or None where the model does not say which that is.

    The text model of a larger one names its body after the larger one's part (`language_model`) and keeps it as
    `model`.
    """
    for name in (getattr(model, "base_model_prefix", ""), "model"):
        body = getattr(model, name, None) if name else None
        if body is not None and body is not model:
            return body
    return None
