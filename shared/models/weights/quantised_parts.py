"""Which tensors a quantised checkpoint lacks, by comparing its layers with each other.

A scheme stores a weight as several tensors (packed numbers, scales, zeros), and which ones is its own affair; but it
does so alike in every layer. A part of which a layer lacks a tensor that another layer's has is not whole, nor is one
expert without a matrix that the others have. Parts that are left unquantised, and scales of activations, which some
layers may do without, are no gaps.
Cost: linear in the tensors.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from shared.models.weights.weight_headers import Stored

_FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
_OPTIONAL = ("bias", "input", "output", "activation", "k_scale", "v_scale", "q_scale", "kv_scale", "pre_quant", "lora")
"""How tensors begin that a quantised part may have or not."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_EXPERT = re.compile(r"(.*\.experts\.\d+)\.(.*)")


def missing_parts(stored: Mapping[str, Stored]) -> list[str]:
    """Return the names of tensors that are missing, as their layer would spell them.

    >>> part = {f"layers.{i}.up.{name}": Stored((4,), "I32") for i in (0, 1) for name in ("qweight", "scales")}
    >>> del part["layers.1.up.scales"]
    >>> missing_parts(part)
    ['layers.1.up.scales']
    """
    tensors = defaultdict[str, set[str]](set)
    for name in stored:
        place, _, ending = name.rpartition(".")
        tensors[place].add(ending)
    quantised = {place: endings for place, endings in tensors.items() if _is_quantised(place, endings, stored)}
    return [*_of_parts(quantised), *_of_experts(quantised)]


def _is_quantised(place: str, endings: set[str], stored: Mapping[str, Stored]) -> bool:
    if any(ending != "weight" and not ending.startswith(_OPTIONAL) for ending in endings):
        return True
    weight = stored.get(f"{place}.weight")
    return weight is not None and not weight.dtype.endswith(_FLOATS)


def _of_parts(quantised: Mapping[str, set[str]]) -> list[str]:
    """Return what a part lacks of what the same part of another layer or expert has."""
    alike = defaultdict[str, list[str]](list)
    for place in quantised:
        alike[_NUMBER.sub("#", place)].append(place)
    found = []
    for places in alike.values():
        needed = {place: {one for one in quantised[place] if not one.startswith(_OPTIONAL)} for place in places}
        for place in places:
            fuller = next((needed[other] for other in places if needed[other] > needed[place]), set[str]())
            found += [f"{place}.{ending}" for ending in sorted(fuller - needed[place])]
    return found


def _of_experts(quantised: Mapping[str, set[str]]) -> list[str]:
    """Return the matrices that an expert lacks and others of its layer have."""
    experts = defaultdict[str, set[str]](set)
    for place in quantised:
        if match := _EXPERT.match(place):
            experts[match[1]].add(match[2])
    layers = defaultdict[str, set[str]](set)
    for expert, parts in experts.items():
        layers[expert.rpartition(".")[0]] |= parts
    return [
        f"{expert}.{part}"
        for expert, parts in experts.items()
        for part in sorted(layers[expert.rpartition(".")[0]] - parts)
    ]
