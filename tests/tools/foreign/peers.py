"""Files as the peers publish them, and what the peers read in them: written from their layouts, in plain float64.

Nothing here uses the product. A teacher is a table of logits; each writer stores its top entries as its project does,
each decoder returns what that project's own reader would, position by position.
"""

from __future__ import annotations

import io
import json
import math
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VOCAB = 512
SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass
class Sample:
    """Token ids [T], and the teacher's log-probabilities [T, V] after each of them."""

    token_ids: list[int]
    logprobs: np.ndarray

    def top(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.argsort(-self.logprobs, axis=1, kind="stable")[:, :k]
        return ids, np.take_along_axis(self.logprobs, ids, 1)


def samples(count: int, seed: int = 0, least: int = 8, most: int = 20, peak: float = 2.0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        num_tokens = int(rng.integers(least, most))
        token_ids = rng.integers(3, VOCAB, num_tokens)
        logits = peak * rng.standard_normal((num_tokens, VOCAB))
        logits[np.arange(num_tokens - 1), token_ids[1:]] += 5.0 * rng.random(num_tokens - 1) + 1.0
        made.append(Sample(token_ids.tolist(), logits - np.log(np.exp(logits).sum(1, keepdims=True))))
    return made


# DistillKit: values


def to_bytes(value: float, kind: str) -> bytes:
    if kind == "bfloat16":  # nearest even
        (word,) = struct.unpack("<I", struct.pack("<f", value))
        return struct.pack("<H", (word + 0x7FFF + ((word >> 16) & 1)) >> 16)
    return struct.pack({"float16": "<e", "float32": "<f", "float64": "<d"}[kind], value)


def from_bytes(data: bytes, kind: str) -> float:
    if kind == "bfloat16":
        return struct.unpack("<f", b"\0\0" + data)[0]
    return struct.unpack({"float16": "<e", "float32": "<f", "float64": "<d"}[kind], data)[0]


def through(value: float, kind: str) -> float:
    return from_bytes(to_bytes(value, kind), kind)


def bits_to_bytes(values: list[int], bits: int) -> bytes:
    text = "".join(format(value, f"0{bits}b") for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def bits_from_bytes(data: bytes, bits: int, count: int) -> list[int]:
    text = "".join(format(byte, "08b") for byte in data)
    return [int(text[i * bits : (i + 1) * bits], 2) for i in range(count)]


def curve(settings: dict[str, Any], num_ranks: int) -> np.ndarray:
    """The functions of the rank [ranks, terms], in the type of the coefficients."""
    kind = settings["term_dtype"]
    step = 1.0 / max(num_ranks - 1, 1) if settings["normalize_t"] else 1.0
    ranks = [through(step * t, kind) for t in range(num_ranks)]
    functions = {"sqrt": math.sqrt, "exp": math.exp}
    terms = settings["polynomial_terms"] or []
    return np.array(
        [[through(functions[f](t) if isinstance(f, str) else t**f, kind) for f in terms] for t in ranks]
    ).reshape(num_ranks, len(terms))


def compress_position(values: np.ndarray, settings: dict[str, Any]) -> bytes:
    """One position's descending log-probabilities as DistillKit writes them."""
    k, exact_k = settings["k"], settings["exact_k"]
    if settings["delta_encoding"]:
        deltas = np.diff(values, prepend=0.0)
        if settings["error_diffusion"]:
            error, diffused = 0.0, []
            for delta in deltas:
                diffused.append(through(delta + error, "float32"))
                error = delta + error - diffused[-1]
            deltas = np.array(diffused)
        values = deltas
    data = b"".join(to_bytes(v, settings["exact_dtype"]) for v in values[:exact_k])
    rest = values[exact_k:k]
    if settings["polynomial_terms"]:
        functions = curve(settings, k - exact_k)
        fitted = np.linalg.pinv(functions) @ rest
        data += b"".join(to_bytes(c, settings["term_dtype"]) for c in fitted)
        rest = rest - functions @ np.array([through(c, settings["term_dtype"]) for c in fitted])
    first, error = 0, 0.0
    for part in settings["residual_bins"]:
        bits, count, kind = part["element_bits"], part["num_elements"], part["scale_dtype"]
        chosen = rest[first : first + count]
        most = 1.0 if bits == 1 else 2.0 ** (bits - 1)
        scale = through(float(np.abs(chosen).max()) / most or 1.0, kind)
        low, high = (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        whole = []
        for value in chosen / scale:
            value += error if settings["error_diffusion"] else 0.0
            whole.append(int(np.clip(np.rint(value), low, high)))
            error = value - whole[-1]
        data += to_bytes(scale, kind) + bits_to_bytes([w - low for w in whole], bits)
        first += count
    return data


def decompress_position(data: bytes, settings: dict[str, Any]) -> np.ndarray:
    """What DistillKit reads in one position, in float64."""
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        return data[at - count : at]

    exact_size, term_size = SIZES[settings["exact_dtype"]], SIZES[settings["term_dtype"]]
    exact = [from_bytes(take(exact_size), settings["exact_dtype"]) for _ in range(settings["exact_k"])]
    num_ranks = settings["k"] - settings["exact_k"]
    terms = settings["polynomial_terms"] or []
    coefficients = [from_bytes(take(term_size), settings["term_dtype"]) for _ in terms]
    rest = [sum(c * f for c, f in zip(coefficients, row, strict=True)) for row in curve(settings, num_ranks)]
    place = 0
    for part in settings["residual_bins"]:
        bits, count = part["element_bits"], part["num_elements"]
        scale = from_bytes(take(SIZES[part["scale_dtype"]]), part["scale_dtype"])
        for q in bits_from_bytes(take((bits * count + 7) // 8), bits, count):
            rest[place] += (2 * q - 1) * scale if bits == 1 else (q - 2 ** (bits - 1)) * scale
            place += 1
    assert at == len(data)
    whole = np.array(exact + rest)
    return np.cumsum(whole) if settings["delta_encoding"] else whole


def settings_of(**given: Any) -> dict[str, Any]:
    return {
        "d": VOCAB,
        "k": 12,
        "exact_k": 4,
        "exact_dtype": "float32",
        "polynomial_terms": [0, 1, "sqrt"],
        "term_dtype": "float32",
        "residual_bins": [],
        "delta_encoding": False,
        "error_diffusion": False,
        "normalize_t": False,
        **given,
    }


def write_distillkit(directory: Path, made: list[Sample], settings: dict[str, Any], **columns: list[list[int]]) -> None:
    """Rows after every token, in two files, with `compression_config.yaml` beside them."""
    directory.mkdir()
    bits = math.ceil(math.log2(settings["d"]))
    rows: dict[str, list[Any]] = {"input_ids": [], "compressed_logprobs": [], "bytepacked_indices": []}
    for sample in made:
        ids, values = sample.top(settings["k"])
        rows["input_ids"].append(sample.token_ids)
        rows["compressed_logprobs"].append([list(compress_position(v, settings)) for v in values])
        rows["bytepacked_indices"].append([list(bits_to_bytes(i.tolist(), bits)) for i in ids])
    table = pa.table({**rows, **columns})
    bytes_of = pa.list_(pa.list_(pa.uint8()))
    kinds = {"input_ids": pa.list_(pa.uint64()), "compressed_logprobs": bytes_of, "bytepacked_indices": bytes_of}
    table = table.cast(
        pa.schema([pa.field(name, kinds.get(name, pa.list_(pa.int64()))) for name in table.column_names])
    )
    half = len(made) // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, directory / f"data_{number}.parquet")
    (directory / "compression_config.yaml").write_text(json.dumps(settings))  # JSON is YAML


def distillkit_reads(directory: Path, settings: dict[str, Any]) -> list[tuple[list[list[int]], np.ndarray]]:
    """(ids, log-probabilities) of every row as the peer decodes them."""
    found = []
    bits = math.ceil(math.log2(settings["d"]))
    for file in sorted(directory.glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            ids = [bits_from_bytes(bytes(packed), bits, settings["k"]) for packed in row["bytepacked_indices"]]
            values = [decompress_position(bytes(data), settings) for data in row["compressed_logprobs"]]
            found.append((ids, np.array(values)))
    return found


def write_older_distillkit(directory: Path, made: list[Sample], settings: dict[str, Any]) -> None:
    """Logits less their mean: `exact_k` of them, and a polynomial of 1/t for the rest; ids in words of 64 bits."""
    directory.mkdir()
    bits = math.ceil(math.log2(settings["vocab_size"]))
    each = 64 // bits
    rows: dict[str, list[Any]] = {"input_ids": [], "packed_indices": [], "exact_values": [], "coeffs": []}
    for sample in made:
        centred = Sample(sample.token_ids, sample.logprobs - sample.logprobs.mean(1, keepdims=True))
        ids, values = centred.top(settings["k"])
        functions = older_curve(settings)
        fitted = (np.linalg.pinv(functions) @ values[:, settings["exact_k"] :].T).T
        words = [
            [sum(i << (bits * n) for n, i in enumerate(row[at : at + each])) for at in range(0, settings["k"], each)]
            for row in ids.tolist()
        ]
        rows["input_ids"].append(sample.token_ids)
        rows["packed_indices"].append(words)
        rows["exact_values"].append(np.float16(values[:, : settings["exact_k"]]).astype(np.float32).tolist())
        rows["coeffs"].append(np.float32(fitted).tolist())
    floats, words_type = pa.list_(pa.list_(pa.float32())), pa.list_(pa.list_(pa.uint64()))
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint64())),
            ("packed_indices", words_type),
            ("exact_values", floats),
            ("coeffs", floats),
        ]
    )
    pq.write_table(pa.table(rows, schema=schema), directory / "data_0.parquet")
    (directory / "compression_config.yaml").write_text(json.dumps({"legacy_logit_compression": settings}))


def older_curve(settings: dict[str, Any]) -> np.ndarray:
    ranks = range(1, settings["k"] - settings["exact_k"] + 1)
    sign = -1 if settings.get("invert_polynomial", True) else 1
    columns = [[float(t) ** (sign * power) for t in ranks] for power in range(settings["polynomial_degree"] + 1)]
    columns += [[math.sqrt(t) for t in ranks]] if settings.get("with_sqrt_term", False) else []
    return np.array(columns).T


def older_distillkit_reads(directory: Path, settings: dict[str, Any]) -> list[tuple[list[list[int]], np.ndarray]]:
    """(ids, logits) of every row as the peer decodes them."""
    found = []
    bits = math.ceil(math.log2(settings["vocab_size"]))
    each, functions = 64 // bits, np.float32(older_curve(settings)).astype(np.float64)
    for row in pq.read_table(directory / "data_0.parquet").to_pylist():
        ids = [
            [(word >> (bits * n)) & ((1 << bits) - 1) for word in words for n in range(each)][: settings["k"]]
            for words in row["packed_indices"]
        ]
        values = [
            [*exact, *(functions @ np.array(c))] for exact, c in zip(row["exact_values"], row["coeffs"], strict=True)
        ]
        found.append((ids, np.array(values)))
    return found


def write_raw_distillkit(file: Path, made: list[Sample], k: int) -> None:
    """Top entries as they are; the row after the last token is left out, as where a server gave none."""
    rows = [(sample.token_ids, *(part[:-1].tolist() for part in sample.top(k))) for sample in made]
    names = ("input_ids", "token_ids", "top_values")
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), file)


# Axolotl


def write_axolotl(file: Path, made: list[Sample], k: int, *, temperature: float, shift: int, prompt: int = 3) -> None:
    """Rows renormalised over k at a temperature; row i about token i (shift 0) or token i + 1 (shift 1)."""
    rows = []
    for sample in made:
        ids, values = sample.top(k)
        values = values / temperature
        values = values - np.log(np.exp(values).sum(1, keepdims=True))
        labels = [-100] * prompt + sample.token_ids[prompt:]
        about = np.arange(len(labels)) + shift
        mask = [[int(prompt <= t < len(labels))] * k for t in about]
        if shift == 0:  # row i holds what the teacher said after token i - 1
            ids, values = np.roll(ids, 1, axis=0), np.roll(values, 1, axis=0)
        values = np.where(np.array(mask) > 0, values, -np.inf)
        ids = np.where(np.array(mask) > 0, ids, np.arange(k))
        rows.append((sample.token_ids, labels, [1] * len(labels), ids.tolist(), values.tolist(), mask))
    names = ("input_ids", "labels", "attention_mask", "target_token_ids", "target_logprobs", "target_mask")
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), file)


# Megatron-LM


def write_megatron(directory: Path, made: list[Sample], k: int, *, nucleus: float | None = None) -> Path:
    """Two data-parallel ranks, two steps of two microbatches of one sequence each; returns the ids' file."""
    import torch
    import zstandard

    directory.mkdir()
    assert len(made) == 8
    for rank in (0, 1):
        members = [("_meta.json", json.dumps({"hash": "0" * 32, "saver": {"k": k, "save_dtype": "fp16"}}).encode())]
        for step in (0, 1):
            chosen = [made[4 * step + 2 * microbatch + rank] for microbatch in (0, 1)]
            tensors: dict[str, list[Any]] = {"values": [], "indices_low": [], "bit_17": []}
            for sample in chosen:
                ids, values = (torch.from_numpy(part[:-1].copy())[:, None] for part in sample.top(k))
                if nucleus is not None:
                    cut = (values.exp().cumsum(-1) - values.exp()) >= nucleus
                    values, ids = values.masked_fill(cut, -1e3), ids.masked_fill(cut, -1)
                tensors["values"].append(values.half())
                tensors["indices_low"].append((ids & 0xFFFF).to(torch.uint16))
                tensors["bit_17"].append((ids >> 16).bool())
            buffer = io.BytesIO()
            torch.save(tensors, buffer)
            members.append((f"{step + 10}.pt.zst", zstandard.ZstdCompressor().compress(buffer.getvalue())))
        with tarfile.open(directory / f"cp0_dp{rank}__11.tar", "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    ids_file = directory.parent / "ids.parquet"
    pq.write_table(pa.table({"input_ids": [sample.token_ids for sample in made]}), ids_file)
    return ids_file


# OpenAI-style servers


def chat_line(tokenizer: Any, messages: list[dict[str, str]], sample: Sample, k: int) -> dict[str, Any]:
    """A chat completion whose answer is the sample's tokens, with its request beside it."""
    ids, values = sample.top(k)
    content = []
    for t, token_id in enumerate(sample.token_ids[1:], 1):
        entry = spelled(tokenizer, token_id, float(sample.logprobs[t - 1, token_id]))
        entry["top_logprobs"] = [
            spelled(tokenizer, i, v) for i, v in zip(ids[t - 1].tolist(), values[t - 1].tolist(), strict=True)
        ]
        content.append(entry)
    message = {"role": "assistant", "content": tokenizer.decode(sample.token_ids[1:])}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": content}}
    return {"messages": messages, "object": "chat.completion", "choices": [choice]}


def spelled(tokenizer: Any, token_id: int, logprob: float) -> dict[str, Any]:
    """A token as servers write it: its text, torn where it is no whole character, and its bytes."""
    letters = {chr(b): b for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    others = [b for b in range(256) if b not in letters.values()]
    letters |= {chr(256 + n): b for n, b in enumerate(others)}
    raw = tokenizer.convert_ids_to_tokens(token_id)
    data = raw.encode() if raw.startswith("<|") else bytes(letters[c] for c in raw)
    return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": logprob}


def completion_line(tokenizer: Any, prompt: str, sample: Sample, k: int) -> dict[str, Any]:
    """A completion: parallel lists, alternatives as a map from text; only whole texts can be told apart."""
    ids, values = sample.top(k)
    text = [spelled(tokenizer, i, 0.0)["token"] for i in range(VOCAB)]
    tokens = sample.token_ids[1:]
    return {
        "prompt": prompt,
        "choices": [
            {
                "text": "".join(text[t] for t in tokens),
                "finish_reason": "length",
                "logprobs": {
                    "tokens": [text[t] for t in tokens],
                    "token_logprobs": [float(sample.logprobs[n, t]) for n, t in enumerate(tokens)],
                    "top_logprobs": [
                        {text[i]: float(v) for i, v in zip(ids[n], values[n], strict=True)} for n in range(len(tokens))
                    ],
                },
            }
        ],
    }


def prompt_logprobs_line(sample: Sample, k: int) -> dict[str, Any]:
    """vLLM's prompt_logprobs: null first, then the token itself and the k best by id."""
    ids, _ = sample.top(k)
    said: list[Any] = [None]
    for t, token_id in enumerate(sample.token_ids[1:]):
        order = np.argsort(-sample.logprobs[t], kind="stable").tolist()
        named = [token_id, *(i for i in ids[t].tolist() if i != token_id)]
        said.append({str(i): {"logprob": float(sample.logprobs[t, i]), "rank": order.index(i) + 1} for i in named})
    choice = {"text": "", "finish_reason": "length", "prompt_token_ids": sample.token_ids, "prompt_logprobs": said}
    return {"choices": [choice]}
