"""Fingerprints of a model's weights and of a tokenizer.

Weights: sizes, safetensors headers and 4 KiB samples of every tensor, so that 150 GB do not stall a start: any
retraining touches every tensor, and a changed shape, name or dtype is in the headers. Cost: some 16 KiB per tensor, a
second for 8B parameters. Tokenizer: what decides which ids a text gets: vocabulary, merges, normaliser, pre-tokeniser
and added tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from shared.errors import CacheError, ModelError
from shared.keys import canonical_json
from shared.special_files import refuse_special_files
from shared.text import strict_json

SAMPLE_BYTES = 4096
SAMPLES_PER_TENSOR = 4
_MAX_HEADER_BYTES = 2**28
_OTHER_SAMPLES = 256
_VOLATILE = ("transformers_version", "_name_or_path")
_WEIGHT_ENDINGS = (".bin", ".pt", ".pth", ".gguf", ".npz")


def weights_hash(model_dir: Path) -> str:
    """Return 32 hexadecimal digits for a model or adapter directory, reading samples of its weights only.

    Raises:
        ModelError: no weights, or a file that is not what its name says.
    """
    refuse_special_files(model_dir)
    digest = xxhash.xxh3_128()
    try:
        for name in ("config.json", "adapter_config.json"):
            path = model_dir / name
            if path.exists():
                config = strict_json.loads(path.read_bytes())
                if isinstance(config, dict):
                    config = {key: value for key, value in config.items() if key not in _VOLATILE}
                digest.update(canonical_json([name, config]))
        tensors = sorted(model_dir.glob("*.safetensors"))
        others = [] if tensors else sorted(p for p in model_dir.iterdir() if p.suffix in _WEIGHT_ENDINGS)
        if not tensors and not others:
            raise ModelError(f"{model_dir} holds no weights (*.safetensors or {', '.join(_WEIGHT_ENDINGS)})")
        for path in (*tensors, *others):
            size = path.stat().st_size
            digest.update(canonical_json([path.name, size]))
            with path.open("rb") as file:
                regions = _safetensors_regions(file, size, digest, path) if tensors else [(0, size, _OTHER_SAMPLES)]
                for start, end, samples in regions:
                    _sample(file, start, end, samples, digest)
    except (OSError, ValueError) as error:
        raise ModelError(f"{model_dir} cannot be fingerprinted ({error}); check that the model is complete") from None
    return digest.hexdigest()


def _safetensors_regions(
    file: BinaryIO, size: int, digest: xxhash.xxh3_128, path: Path
) -> Iterable[tuple[int, int, int]]:
    """Hash the header and return (start, end, samples) of each tensor's bytes."""
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > min(_MAX_HEADER_BYTES, size):
        raise ModelError(f"{path} claims a header of {header_bytes} bytes; it is not a complete safetensors file")
    text = file.read(header_bytes)
    digest.update(text)
    regions = []
    try:
        offsets = {n: tensor["data_offsets"] for n, tensor in strict_json.loads(text).items() if n != "__metadata__"}
        for name, (first, last) in offsets.items():
            if type(first) is not int or type(last) is not int or not 0 <= first <= last:
                raise ValueError(f"tensor {name} lies at {first!r} to {last!r}")
            start, end = 8 + header_bytes + first, 8 + header_bytes + last
            if end > size:
                raise ModelError(f"{path} ends at byte {size} where tensor {name} needs {end}; download it again")
            regions.append((start, end, SAMPLES_PER_TENSOR))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path} has no header of a safetensors file ({type(error).__name__}: {str(error)[:90]}); download it again"
        ) from None
    return regions


def _sample(file: BinaryIO, start: int, end: int, samples: int, digest: xxhash.xxh3_128) -> None:
    """Hash evenly spaced samples of [start, end), the first and last bytes among them."""
    last = max(start, end - SAMPLE_BYTES)
    steps = 1 if last - start <= samples * SAMPLE_BYTES else samples - 1
    if steps == 1:
        file.seek(start)
        digest.update(file.read(min(end - start, (samples + 1) * SAMPLE_BYTES)))
        return
    for i in range(steps + 1):
        file.seek(start + (last - start) * i // steps)
        digest.update(file.read(SAMPLE_BYTES))


def tokenizer_hash(tokenizer_json: bytes, where: object = "the tokenizer") -> str:
    """Return 32 hexadecimal digits for a `tokenizer.json`; equal where every text gets equal ids.

    Formatting, order, padding, truncation and templates do not count. `where` is what the bytes are called.

    Raises:
        CacheError: the bytes are not a tokenizer.
    """
    try:
        document = strict_json.loads(tokenizer_json)
        model = document["model"]
        vocabulary = model["vocab"]
        added = sorted([token["id"], token["content"]] for token in document.get("added_tokens") or [])
        identity: dict[str, Any] = {
            "type": model.get("type"),
            "vocabulary": vocabulary,
            "merges": [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []],
            "normalizer": document.get("normalizer"),
            "pre_tokenizer": document.get("pre_tokenizer"),
            "added_tokens": added,
        }
        return xxhash.xxh3_128_hexdigest(canonical_json(identity))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(
            f"{where} is not a tokenizer.json ({type(error).__name__}: {error}); put back the model's own"
        ) from None
