"""`decant cache show`: what a cache is, for somebody who has only the cache, and one of its rows token by token.

Of a cache: teacher, capture, sources, sizes and licence from the small files, and a row of each source. Of a row: every
supervised token with its log-probability and what else the teacher considered.
Token texts come from the tokenizer in the cache, through the light `tokenizers` library; without it, ids are shown.

Shape letters: S supervised positions, N head entries, J captured temperatures.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.cache import Cache
from shared.cache.tokenizer_files import read_tokenizer_files
from shared.errors import CacheError, NamingError
from shared.payload.targets import SparseTargets
from shared.tokens.tokenizer_file import plain_tokenizer

MOST_TEXT = 400
"""Characters shown of a prompt."""
MOST_SAMPLES = 5
TAIL_MEANS = {
    "exact": "the mass outside the head is the teacher's own",
    "derived": "the mass outside the head is 1 minus what was stored of it, so temperature 1 alone can be trained at",
    "unknown": "the mass outside the head is not known; train with head_kl and cross_entropy",
}
"""What the tail of a layer means for training."""


def row_document(cache: Cache, index: int, top: int) -> dict[str, Any]:
    """Return one row with `top` alternatives per supervised token.

    Raises:
        CacheError: there is no such row.
        DamagedError: the row is not what was committed.
    """
    if index >= len(cache):
        raise NamingError(f"{cache.path} has {len(cache):,} rows, so there is no row {index}; rows count from 0")
    row = cache[index]
    text_of, note = _token_texts(cache.path)
    labels, predictors = row.labels(), row.predictor_index()
    tokens: list[dict[str, Any]] = []
    for s, (label, predictor) in enumerate(zip(labels.tolist(), predictors.tolist(), strict=True)):
        token = {"at": predictor + 1, "id": label, "text": text_of(label)}
        if row.targets is not None:
            token |= _position(row.targets, s, top, text_of)
        tokens.append(token)
    return {
        "row": index,
        "rows": len(cache),
        "where": cache.where(index),
        "layer": cache.layer_name,
        "tail": cache.layer.tail if cache.layer else None,
        "source": row.source,
        "finish_reason": row.finish_reason,
        "num_tokens": len(row.token_ids),
        "prompt": row.prompt,
        "response": row.response,
        "reference": row.reference,
        "note": note,
        "tokens": tokens,
    }


def _position(targets: SparseTargets, s: int, top: int, text_of: Callable[[int], str]) -> dict[str, Any]:
    """Describe what the teacher said at position s."""
    offsets = targets.offsets()
    begin, end = int(offsets[s]), int(offsets[s + 1])
    entries = [
        {"id": i, "text": text_of(i), "logprob": round(logprob, 4)}
        for i, logprob in zip(targets.ids[begin:end].tolist(), targets.logprobs[begin:end].tolist(), strict=True)
    ]
    tails = {
        f"{t:g}": None if math.isnan(tail) else round(math.exp(tail), 6)
        for t, tail in zip(targets.temperatures, targets.tail_logmass[s].tolist(), strict=True)
    }
    label = float(targets.label_logprobs[s])
    described = {
        "logprob": round(label, 4) if math.isfinite(label) else None,
        "kept": end - begin,
        "alternatives": entries[:top],
        "tail_mass": tails,
    }
    if targets.draws:
        drawn = targets.draws[targets.temperatures.index(1.0)]
        first = int(drawn.counts[:s].sum())
        last = first + int(drawn.counts[s])
        pairs = zip(drawn.ids[first:last].tolist(), drawn.multiplicities[first:last].tolist(), strict=True)
        described["draws"] = [{"id": i, "text": text_of(i), "times": times} for i, times in pairs]
    return described


def row_text(document: dict[str, Any]) -> str:
    """Lay a row out in columns: token, probability, log-probability, alternatives, the mass of the rest."""
    prompt, response = document["prompt"], document["response"]
    lines = [
        f"row {document['row']} of {document['rows']:,}, source {document['source']}, {document['where']}",
        f"layer {document['layer'] or '(none)'}, {document['num_tokens']} tokens, {len(document['tokens'])} "
        f"supervised, finished by {document['finish_reason']}",
        *([document["note"]] if document["note"] else []),
        "",
        f"prompt:   {shortened(prompt)}",
        f"response: {shortened(response)}",
        *([f"reference: {shortened(document['reference'])}"] if document["reference"] else []),
        "",
    ]
    width = min(max([len(token["text"]) for token in document["tokens"]] + [5]), 20)
    lines.append(
        f"{'at':>6}  {'token':{width}}  {'p %':>6}  {'log p':>8}  {'rest %':>6}  {'kept':>4}  the teacher would say"
    )
    lines += [_token_line(token, width, document["tail"]) for token in document["tokens"]]
    return "\n".join(lines)


def _token_line(token: dict[str, Any], width: int, tail_kind: str | None) -> str:
    """Lay a token out; a label without a log-probability is impossible to a teacher that knew all of its mass."""
    start = f"{token['at']:6d}  {token['text'][:width]:{width}}"
    if "kept" not in token:
        return start.rstrip()
    logprob = token["logprob"]
    probability = f"{0:6.2f}  {'-inf':>8}" if tail_kind == "exact" else f"{'?':>6}  {'?':>8}"
    probability = probability if logprob is None else f"{100 * math.exp(logprob):6.2f}  {logprob:8.3f}"
    said = "  ".join(f"{entry['text']} {100 * math.exp(entry['logprob']):.1f}" for entry in token["alternatives"])
    said += "".join(f"  {draw['text']} x{draw['times']}" for draw in token.get("draws", []))
    tail = token["tail_mass"]["1"]
    rest = f"{'?':>6}" if tail is None else f"{100 * tail:6.2f}"
    return f"{start}  {probability}  {rest}  {token['kept']:4d}  {said}".rstrip()


def shortened(text: str) -> str:
    """Show a text on one line, its middle left out where it is long."""
    line = (
        text.encode("unicode_escape").decode()
        if not text.replace("\n", "").isprintable()
        else text.replace("\n", "\\n")
    )
    return line if len(line) <= MOST_TEXT else f"{line[: MOST_TEXT // 2]} ... {line[-MOST_TEXT // 2 :]}"


def _token_texts(cache_dir: Path) -> tuple[Callable[[int], str], str | None]:
    """Return how to write a token, and a note where only ids can be shown."""
    path = cache_dir / "tokenizer" / "tokenizer.json"
    if importlib.util.find_spec("tokenizers") is None:
        return str, "ids are shown, because the library `tokenizers` is not installed (pip install tokenizers)"
    try:
        tokenizer = plain_tokenizer(read_tokenizer_files(cache_dir)["tokenizer.json"], str(path))
    except KeyError:
        return str, f"ids are shown, because {path} does not exist"
    except CacheError as error:
        return str, f"ids are shown, because {error}"

    def text_of(token_id: int) -> str:
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        return json.dumps(text, ensure_ascii=not text.isprintable())  # what cannot be seen is escaped

    return text_of, None


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
