"""What a model's config says about the lengths of rows: how many positions it knows, and which lengths share one
rotation.

Rotary frequencies of type `dynamic` and `longrope` depend on the longest row of a forward pass, so rows of different
classes must not meet in one; all other models have one class. Cost: reading the config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

_ORIGINAL = "original_max_position_embeddings"
LengthClass = tuple[int, ...]
"""Rows of one class may share a forward pass."""


def known_positions(config: Any) -> int | None:
    """Return how many positions a text config says the model knows, or None where it says nothing or stretches its
    rotation.

    Example: `max_position_embeddings: 16` -> 16; the same with `rope_parameters: {rope_type: linear, factor: 4}` ->
    None.
    """
    longest = getattr(config, "max_position_embeddings", None)
    stretches = any(rope.get("rope_type", rope.get("type", "default")) != "default" for rope in _ropes(config))
    return None if stretches or not isinstance(longest, int) or longest < 1 else longest


def rope_switches(config: Any) -> tuple[tuple[str, int], ...]:
    """Return (type, tokens) of every rotation that changes for rows above so many tokens.

    Example: longrope with `original_max_position_embeddings: 4096` -> `(("longrope", 4096),)`; a plain rotation ->
    `()`.
    """
    found = set()
    for rope in _ropes(config):
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if "dynamic" in kind:
            found.add(("dynamic", int(config.max_position_embeddings)))
        elif kind in ("longrope", "su"):
            named = (rope.get(_ORIGINAL), getattr(config, _ORIGINAL, None), config.max_position_embeddings)
            found.add(("longrope", next(int(length) for length in named if length)))
    return tuple(sorted(found))


def length_class_of(config: Any) -> Callable[[int], LengthClass]:
    """Return the function from a row's tokens to its class.

    Example: longrope with a switch at 64 -> `f(40) == f(64) == (0,)`, `f(65) == (1,)`; a plain rotation -> always `()`.
    """
    switches = rope_switches(config)

    def length_class(num_tokens: int) -> LengthClass:
        return tuple(0 if num_tokens <= most else 1 if kind == "longrope" else num_tokens for kind, most in switches)

    return length_class


def reset_rotations(model: Any) -> None:
    """Let dynamic rotations forget the longest row seen so far, so that a pass depends on its own rows alone."""
    for module in model.modules():
        if not hasattr(module, "original_max_seq_len"):
            continue
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, module.original_max_seq_len)
        for name in [name for name, _ in module.named_buffers(recurse=False) if name.endswith("original_inv_freq")]:
            setattr(module, name.replace("original_inv_freq", "inv_freq"), getattr(module, name))


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the sections of a config that describe a rotation: one, or one per type of layers."""
    section = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(section, Mapping):
        per_layer = [rope for rope in section.values() if isinstance(rope, Mapping)]
        yield from per_layer or [section]
