"""Identity: what differs is named with both values, what does not matter is not compared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import CacheError, DamagedError, ModelError
from shared.identity.identity import LayerIdentity, SequencesIdentity, difference
from shared.identity.weights_hash import tokenizer_hash, weights_hash
from tests.shared.small_cache import HYBRID, SEQUENCES, TOP

CHANGES: dict[str, Any] = {
    "weights_hash": "other",
    "tokenizer_hash": "other",
    "vocab_size": 51,
    "mode": "top+sample",
    "k": 7,
    "draws": 3,
    "mass": 0.99,
    "temperatures": (1.0, 4.0),
    "gap_step": 0.125,
    "dtype": "float32",
    "head_dtype": "auto",
    "revision": "main",
    "quantization": "fp8",
    "adapter": "hash",
    "draw_key": "row",
    "label": "head",
    "derived_from": "top8-0123abcd",
    "method": "bytes",
    "tail": "unknown",
    "labels": "head",
}


@pytest.mark.parametrize("name", CHANGES)
def test_layer_difference_names_field_and_both_values(name: str) -> None:
    other = dataclasses.replace(TOP, **{name: CHANGES[name]})
    assert other.hash8 != TOP.hash8
    found = difference(TOP, other)
    assert found is not None
    assert found.startswith(f"{name} is {getattr(TOP, name)!r} in this targets layer and {CHANGES[name]!r}")


def test_every_field_of_a_layer_but_its_path_counts() -> None:
    compared = {f.name for f in dataclasses.fields(LayerIdentity)} - {"teacher", "codec"}
    assert compared == set(CHANGES)
    moved = dataclasses.replace(TOP, teacher="elsewhere")
    assert difference(TOP, moved) is None
    assert moved.hash8 == TOP.hash8


def test_licence_is_recorded_but_not_compared() -> None:
    assert difference(SEQUENCES, dataclasses.replace(SEQUENCES, licence="MIT", answers="x")) is None
    assert (
        difference(SEQUENCES, dataclasses.replace(SEQUENCES, vocab_size=7))
        == "vocab_size is 50 in this cache and 7 in the request"
    )


def test_identities_survive_json() -> None:
    for identity in (TOP, HYBRID, SEQUENCES):
        assert type(identity).from_json(json.loads(json.dumps(identity.to_json())), "x") == identity


@pytest.mark.parametrize(
    "change",
    [
        {"k": "6"},
        {"k": True},
        {"k": 1.5},
        {"temperatures": 1.0},
        {"temperatures": ["1"]},
        {"extra": 1},
        {"mode": None},
        {"mass": "1"},
    ],
)
def test_altered_identity_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DamagedError, match=r"layer\.json"):
        LayerIdentity.from_json({**TOP.to_json(), **change}, "layer.json")
    missing = TOP.to_json()
    del missing["k"]
    with pytest.raises(DamagedError, match="missing or unknown"):
        LayerIdentity.from_json(missing, "layer.json")


def test_default_names() -> None:
    assert TOP.name == "top6"
    assert HYBRID.name == "top3-sample4"
    assert dataclasses.replace(TOP, mode="sample", k=0, draws=12).name == "sample12"


def test_identity_with_an_unknown_codec_or_impossible_settings_is_refused() -> None:
    for change in ({"codec": "planes-9"}, {"gap_step": 0.0}, {"temperatures": (2.0,)}, {"k": 70_000}):
        with pytest.raises(DamagedError):
            dataclasses.replace(TOP, **change).make_codec()


def save(path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    """Write a model directory by the published description of safetensors."""
    path.mkdir()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + b"".join(tensor.tobytes() for tensor in tensors.values())
    (path / "model.safetensors").write_bytes(data)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_weights_hash_sees_training_and_config_but_not_who_saved_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(300, 400)).astype(np.float32),
        "b": np.ones(3, np.float32),
        "none": np.zeros(0, np.float32),
    }
    first = weights_hash(save(tmp_path / "1", tensors, {"hidden": 4, "transformers_version": "5.16"}))
    assert first == weights_hash(save(tmp_path / "2", tensors, {"transformers_version": "5.20", "hidden": 4}))
    assert first != weights_hash(save(tmp_path / "3", tensors, {"hidden": 8}))
    assert first != weights_hash(
        save(tmp_path / "4", {**tensors, "a": tensors["a"] * np.float32(1.0001)}, {"hidden": 4})
    )
    assert first != weights_hash(save(tmp_path / "5", {**tensors, "b": np.array([1, 1, 2], np.float32)}, {"hidden": 4}))
    assert first != weights_hash(save(tmp_path / "6", {"c": tensors["a"], "b": tensors["b"]}, {"hidden": 4}))


def test_weights_hash_reads_samples_only(tmp_path: Path) -> None:
    path = save(tmp_path / "1", {"a": np.zeros(4, np.float32)}, {})
    header = json.dumps({"big": {"dtype": "F32", "shape": [2**31], "data_offsets": [0, 2**33]}}).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**33)  # 8 GiB of holes: reading it all would take seconds and show
    before = Path("/proc/self/io").read_text() if Path("/proc/self/io").exists() else ""
    weights_hash(path)
    if before:
        read = [int(text.split("rchar: ")[1].split()[0]) for text in (before, Path("/proc/self/io").read_text())]
        assert read[1] - read[0] < 2**20


def test_incomplete_models_are_refused_with_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "1", {"a": np.zeros(4000, np.float32)}, {})
    data = (path / "model.safetensors").read_bytes()
    for cut, text in (
        (data[:-1], "download it again"),
        (data[:4], "not a complete"),
        (data[:8] + b"x" * 200, "no header of a safetensors file"),
        (b"\xff" * 100, "not a complete"),
    ):
        (path / "model.safetensors").write_bytes(cut)
        with pytest.raises(ModelError, match=text):
            weights_hash(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no weights"):
        weights_hash(tmp_path / "empty")
    with pytest.raises(ModelError, match="cannot be fingerprinted"):
        weights_hash(tmp_path / "absent")


def tokenizer(**changes: Any) -> bytes:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]} | changes.pop("model", {})
    document = {
        "version": "1.0",
        "added_tokens": [{"id": 3, "content": "<end>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel"},
        "post_processor": None,
        "padding": None,
        "model": model,
    }
    return json.dumps({**document, **changes}).encode()


def test_tokenizer_hash_ignores_what_decides_no_id() -> None:
    first = tokenizer_hash(tokenizer())
    assert tokenizer_hash(tokenizer(padding={"length": 3}, post_processor={"type": "x"})) == first
    assert tokenizer_hash(tokenizer(model={"vocab": {"ab": 2, "b": 1, "a": 0}, "merges": [["a", "b"]]})) == first
    assert tokenizer_hash(json.dumps(json.loads(tokenizer()), indent=4).encode()) == first


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"added_tokens": []},
        {"added_tokens": [{"id": 4, "content": "<end>"}]},
        {"model": {"vocab": {"a": 1, "b": 0, "ab": 2}}},
        {"model": {"merges": []}},
    ],
)
def test_tokenizer_hash_sees_what_decides_ids(change: dict[str, Any]) -> None:
    assert tokenizer_hash(tokenizer(**change)) != tokenizer_hash(tokenizer())


@pytest.mark.parametrize("data", [
    b"", b"[]", b"{}", b'{"model": {}}', b'{"model": {"vocab": {}}, "added_tokens": [1]}', b"\xff",
    b'{"model": {"vocab": {}, "merges": [["a", Infinity]]}}', b'{"model": {"vocab": {}, "merges": 5}}',
    b'{"model": {"vocab": 1e999}}', b'{"model": {"vocab": {}}, "normalizer": {"type": NaN}}',
])  # fmt: skip
def test_what_is_no_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises(CacheError, match=r"not a tokenizer\.json"):
        tokenizer_hash(data)


def test_kinds_of_identity_are_not_compared_with_each_other() -> None:
    with pytest.raises(TypeError):
        difference(TOP, SequencesIdentity(tokenizer_hash="x", vocab_size=1))


@pytest.mark.parametrize(
    "header",
    [
        "[1]",
        "[" * 100_000,
        '{"a": null}',
        '{"a": {"dtype": "F32", "shape": [1]}}',
        '{"a": {"data_offsets": [0, 4, 8]}}',
        '{"a": {"data_offsets": ["0", "4"]}}',
        '{"a": {"data_offsets": [0.5, 4]}}',
        '{"a": {"data_offsets": [1e999, 4]}}',
        '{"a": {"data_offsets": [-8, 0]}}',
        '{"a": {"data_offsets": [4, 0]}}',
        '{"a": {"data_offsets": [0, 4]}, "a": {"data_offsets": [0, 4]}}',
    ],
)
def test_headers_that_no_safetensors_file_has_are_refused_in_a_sentence(tmp_path, header):
    data = header.encode()
    (tmp_path / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(8))
    with pytest.raises(ModelError, match=r"model\.safetensors has no header of a safetensors file .*download it again"):
        weights_hash(tmp_path)
