"""The golden cache: every later version must read what this one wrote, and docs/format.md must suffice
to read it too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
import zstandard

from shared.cache.cache import Cache
from shared.cache.reading.verify import parts_without_layer, verify_cache
from tests.shared.make_golden import GOLDENS, ROOT, arrays_of, texts_of
from tests.shared.small_cache import HYBRID, TOP

Expected = tuple[dict[str, Any], dict[str, np.ndarray]]
LAYERS = (TOP.name, HYBRID.name)


@pytest.fixture(scope="module", params=GOLDENS)
def golden(request: pytest.FixtureRequest) -> Path:
    return ROOT / request.param


@pytest.fixture(scope="module")
def expected(golden: Path) -> Expected:
    with np.load(golden / "expected.npz", allow_pickle=False) as arrays:
        return json.loads((golden / "expected.json").read_text(encoding="utf-8")), dict(arrays)


@pytest.mark.parametrize("layer", LAYERS)
def test_golden_cache_reads_as_it_was_written(golden: Path, layer: str, expected: Expected) -> None:
    texts, arrays = expected
    cache = Cache.open(golden / "cache", targets=layer, verify=True)
    assert cache.cache_id == texts[layer]["cache_id"]
    assert len(cache) == len(texts[layer]["rows"]) == 6
    seen = 0
    for i, row in enumerate(cache):
        assert texts_of(row) == texts[layer]["rows"][i]
        for name, value in arrays_of(row).items():
            wanted = arrays[f"{layer}/{i}/{name}"]
            assert value.dtype == wanted.dtype
            assert np.allclose(value, wanted, rtol=0, atol=2e-6, equal_nan=True), name
            seen += 1
    assert seen == sum(name.startswith(layer + "/") for name in arrays)


def test_golden_cache_verifies(golden: Path) -> None:
    assert list(verify_cache(golden / "cache")) == []


def test_sealed_files_carry_the_checksum_that_the_page_describes() -> None:
    cache = ROOT / "format-1-sealed" / "cache"
    files = [*cache.rglob("cache.json"), *cache.rglob("layer.json"), *cache.rglob("part-*.json")]
    assert len(files) == 1 + 3 + 2 * 4
    for file in files:
        said = json.loads(file.read_text(encoding="utf-8"))["checksum"]
        assert xxhash.xxh3_128_hexdigest(file.read_bytes().replace(said.encode(), b"0" * 32)) == said


def test_parts_of_layers_say_which_layer_they_are_of() -> None:
    assert parts_without_layer(ROOT / "format-1-sealed" / "cache") == {}
    assert set(parts_without_layer(ROOT / "format-1" / "cache").values()) == {2}
    for part in (ROOT / "format-1-sealed" / "cache" / "targets").rglob("*.arrow"):
        with pa.memory_map(str(part)) as file:
            assert pa.ipc.open_file(file).schema.metadata[b"layer"].decode() == part.parent.name[-8:]


def read_by_the_page(directory: Path, layer: str) -> list[dict[str, Any]]:
    """A second reader, written from docs/format.md with loops and plain numbers; imports nothing of ours."""
    folder = next((directory / "targets").glob(f"{layer}-????????"))
    identity = json.loads((folder / "layer.json").read_text())["identity"]
    rows = []
    for record in sorted((directory / "sequences").glob("part-*.json")):
        with (
            pa.memory_map(str(record.with_suffix(".arrow"))) as sequences,
            pa.memory_map(str(folder / f"{record.stem}.arrow")) as targets,
        ):
            pairs = zip(
                pa.ipc.open_file(sequences).read_all().to_pylist(),
                pa.ipc.open_file(targets).read_all().to_pylist(),
                strict=True,
            )
        for sequence, target in pairs:
            assert sequence["key"] == target["key"]
            assert target["num_positions"] == sum(end - start for start, end in sequence["spans"])
            rows.append(decode_by_the_page(target["blob"], target["num_positions"], identity))
    return rows


def decode_by_the_page(blob: bytes, num_positions: int, identity: dict[str, Any]) -> dict[str, Any]:
    content = zstandard.ZstdDecompressor().decompress(blob)
    at = 0

    def take(count: int, num_bytes: int) -> list[int]:
        nonlocal at
        planes = [content[at + i * count : at + (i + 1) * count] for i in range(num_bytes)]
        at += count * num_bytes
        return [sum(planes[i][n] << (8 * i) for i in range(num_bytes)) for n in range(count)]

    counts = take(num_positions, 2)
    ids = take(sum(counts), 3)
    gaps = iter(take(sum(count - 1 for count in counts if count), 2))
    labels = [-math.inf if code == 65535 else -code / 512 for code in take(num_positions, 2)]
    odds = [take(num_positions, 2) for _ in identity["temperatures"]]
    draws = []
    for _ in identity["temperatures"] if identity["draws"] else []:
        draw_counts = take(num_positions, 2)
        draws.append((draw_counts, take(sum(draw_counts), 3), take(sum(draw_counts), 2)))
    assert at == len(content)

    def mass(code: int) -> float:
        return 0.0 if code == 0 else 1.0 if code == 65535 else 1 / (1 + math.exp(-(code - 32768) / 1024))

    logprobs = []
    for s, count in enumerate(counts):
        codes = [0]
        for _ in range(count - 1):
            codes.append(codes[-1] + next(gaps))
        weights = [math.exp(-code * identity["gap_step"]) for code in codes[:count]]
        head = 1 - mass(odds[identity["temperatures"].index(1.0)][s])
        logprobs += [math.log(head * weight / sum(weights)) for weight in weights]
    tails = [[math.log(mass(column[s])) if column[s] else -math.inf for column in odds] for s in range(num_positions)]
    return {
        "counts": counts,
        "ids": ids,
        "logprobs": logprobs,
        "label_logprobs": labels,
        "tail_logmass": tails,
        "draws": draws,
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_page_suffices_to_write_a_reader(golden: Path, layer: str, expected: Expected) -> None:
    _, arrays = expected
    for i, row in enumerate(read_by_the_page(golden / "cache", layer)):
        for name in ("counts", "ids", "logprobs", "label_logprobs", "tail_logmass"):
            assert np.allclose(row[name], arrays[f"{layer}/{i}/{name}"], rtol=0, atol=1e-5), name
        for j, drawn in enumerate(row["draws"]):
            for name, value in zip(("counts", "ids", "multiplicities"), drawn, strict=True):
                assert value == arrays[f"{layer}/{i}/draws{j}_{name}"].tolist()
