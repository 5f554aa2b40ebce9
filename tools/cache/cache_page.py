"""`decant cache show` without a row: what a cache is, for somebody who has only the cache.

Teacher, capture, sources, sizes and licence come from the small files; a row of each source shows what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.cache import Cache
from tools.cache.cache_show import shortened

MOST_SAMPLES = 5
TAIL_MEANS = {
    "exact": "the mass outside the head is the teacher's own",
    "derived": "the mass outside the head is 1 minus what was stored of it, so temperature 1 alone can be trained at",
    "unknown": "the mass outside the head is not known; train with head_kl and cross_entropy",
}
"""What the tail of a layer means for training."""


def page_document(found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a listing with tokens, lengths, tails and a sample row of each source."""
    cache = Cache.open_sequences(path)
    lengths = np.sort(cache.num_tokens)
    samples = []
    for code, name in list(enumerate(cache.source_names))[:MOST_SAMPLES]:
        rows = np.flatnonzero(cache.sources == code)
        if len(rows):
            row = cache.sequence(int(rows[0]))
            texts = {"prompt": row.prompt, "response": row.response, "reference": row.reference}
            samples.append({"row": int(rows[0]), "source": name, "finish_reason": row.finish_reason, **texts})
    tails = {name: layer["identity"].get("tail", "exact") for name, layer in found["layers"].items()}
    middle = int(lengths[len(lengths) // 2]) if len(lengths) else 0
    return {
        **found,
        "tokens": int(lengths.sum(dtype=np.int64)),
        "row_tokens": {"median": middle, "longest": int(lengths.max(initial=0))},
        "tails": {name: {"kind": kind, "means": TAIL_MEANS[kind]} for name, kind in tails.items()},
        "samples": samples,
    }


def page_lines(document: Mapping[str, Any]) -> list[str]:
    """Lay out what a page says beyond the listing."""
    sizes = document["row_tokens"]
    half = f"half of the rows have at most {sizes['median']:,}, the longest {sizes['longest']:,}"
    lines = [f"  {document['tokens']:,} tokens; {half}"]
    lines += [f"  licence: {document['identity']['licence'] or 'not said'}"]
    lines += [f"  tail of {name} {tail['kind']}: {tail['means']}" for name, tail in document["tails"].items()]
    for layer in document["layers"].values():
        each = layer["bytes"] / max(layer["positions"], 1)
        lines.append(f"  {each:,.1f} bytes per position of {layer['identity']['teacher']}")
    for sample in document["samples"]:
        lines += ["", f"row {sample['row']}, source {sample['source']}, finished by {sample['finish_reason']}"]
        lines += [f"{name}: {shortened(sample[name])}" for name in ("prompt", "response", "reference") if sample[name]]
    path = document["path"]
    lines += ["", f"a row token by token: decant cache show {path} --row 0"]
    return [*lines, f"a recipe that trains from it: decant init NAME --cache {path} --student DIR"]
