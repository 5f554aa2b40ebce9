"""Caches of somebody who knows the format: every record and checksum agrees with the change, and the cache is wrong.

`CASES` maps a name to a change of a small cache with a targets layer, a layer with draws and a hidden layer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
import zstandard

from shared.parts.jobs import job_id
from tests.shared.altered import edit, resign, rewrite, with_column
from tests.shared.small_cache import HYBRID, TOP
from tests.shared.test_hidden_layer import STATES, add_hidden

Change = Callable[[Path], object]
TARGETS = f"targets/{TOP.name}-{TOP.hash8}"
DRAWS = f"targets/{HYBRID.name}-{HYBRID.hash8}"
HIDDEN = f"hidden/{STATES.name}-{STATES.hash8}"
HUGE = 1e308
CASES: dict[str, Change] = {}


def make(path: Path) -> None:
    """Build the cache that is altered."""
    add_hidden(path, layers=(TOP, HYBRID))


def part(path: Path, folder: str, number: int = 0) -> Path:
    return sorted((path / folder).glob("part-*.arrow"))[number]


def record(path: Path, folder: str) -> Path:
    return part(path, folder).with_suffix(".json")


def plan(path: Path) -> Path:
    return next((path / "jobs").glob("*/plan.arrow"))


def _raw(path: Path, name: str, old: str, new: str) -> None:
    """Replace text that no JSON writer gives, such as NaN, and drop the checksum."""
    document = json.loads((path / name).read_text())
    document.pop("checksum")
    text = json.dumps(document, indent=1, sort_keys=True)
    assert old in text
    (path / name).write_text(text.replace(old, new, 1))


def _numbers() -> None:
    values = ("NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "-1", '"x"', "null", "[]", "{}", "true", "1.5")
    for value in values:
        CASES[f"rows of a record {value[:12]}"] = lambda p, v=value: _raw(
            p, str(record(p, "sequences").relative_to(p)), '"rows": 4,', f'"rows": {v},'
        )
        CASES[f"vocab_size {value[:12]}"] = lambda p, v=value: _raw(
            p, "cache.json", '"vocab_size": 50', f'"vocab_size": {v}'
        )
        CASES[f"support_sum {value[:12]}"] = lambda p, v=value: edit_text(record(p, TARGETS), "support_sum", v)
        if value not in ("1.5", "true"):
            CASES[f"gap_step {value[:12]}"] = lambda p, v=value: _raw(
                p, f"{TARGETS}/layer.json", '"gap_step": 0.0625', f'"gap_step": {v}'
            )


def edit_text(path: Path, name: str, value: str) -> None:
    """Set a figure to a piece of JSON text."""
    document = json.loads(path.read_text())
    document.pop("checksum")
    document["stats"][name] = "HERE"
    path.write_text(json.dumps(document).replace('"HERE"', value))


def _shapes() -> None:
    for name, value in (
        ("sources", 5),
        ("sources", {"math": None}),
        ("sources", {"math": {"rows": HUGE}}),
        ("finish_reasons", []),
        ("finish_reasons", {"stop": "x"}),
        ("rows", 10**18),
        ("unknown", 1),
        ("tokens", [1]),
    ):
        CASES[f"sequences stats {name} {value}"] = lambda p, n=name, v=value: edit(
            record(p, "sequences"), lambda d: d["stats"].update({n: v})
        )
    for name, value in (
        ("entropy_histogram", "x"),
        ("entropy_histogram", [1]),
        ("support_histogram", [0.5] * 18),
        ("support_histogram", [[0]] * 18),
        ("blob_bytes", -1),
        ("label_nll_nats_sum", {}),
        ("positions", 7),
        ("tail_mass_sum", HUGE),
        ("entropy_nats_sum", -HUGE),
        ("impossible_labels", 3),
    ):
        CASES[f"targets stats {name} {str(value)[:20]}"] = lambda p, n=name, v=value: edit(
            record(p, TARGETS), lambda d: d["stats"].update({n: v})
        )
    for name, value in (
        ("set_aside", [1]),
        ("set_aside", {}),
        ("software", []),
        ("xxh3", "z" * 32),
        ("bytes", 2**60),
        ("stem", "\x1b[31m"),
        ("layer", "0" * 8),
        ("layer", 7),
        ("positions", 10**9),
        ("format", True),
        ("more", 1),
    ):
        CASES[f"record {name} {str(value)[:12]!r}"] = lambda p, n=name, v=value: edit(
            record(p, TARGETS), lambda d: d.update({n: v})
        )
    for name, value in (
        ("identity", []),
        ("tokenizer_files", {"a/../b": {"bytes": 1, "xxh3": "0" * 32}}),
        ("tokenizer_files", {"tokenizer.json": {"bytes": 2**40, "xxh3": "0" * 32}}),
        ("tokenizer_files", {"tokenizer.json": 5}),
        ("provenance", 1),
    ):
        CASES[f"cache.json {name} {value}"] = lambda p, n=name, v=value: edit(
            p / "cache.json", lambda d: d.update({n: v})
        )
    CASES["tokenizer_hash of cache.json"] = lambda p: edit(
        p / "cache.json", lambda d: d["identity"].update(tokenizer_hash="x")
    )
    for name, value in (("mode", "all"), ("mass", 0.0), ("mass", 2.0), ("temperatures", [2.0]), ("temperatures", [])):
        CASES[f"layer {name} {value}"] = lambda p, n=name, v=value: edit(
            p / TARGETS / "layer.json", lambda d: d["identity"].update({n: v})
        )


def _columns() -> None:
    for folder, name in (
        ("sequences", "key"),
        ("sequences", "row_key"),
        ("sequences", "group_key"),
        ("sequences", "source"),
        ("sequences", "prompt"),
        ("sequences", "response"),
        ("sequences", "token_ids"),
        ("sequences", "spans"),
        ("sequences", "finish_reason"),
        (TARGETS, "key"),
        (TARGETS, "num_positions"),
        (TARGETS, "teacher_nll_nats"),
        (TARGETS, "blob"),
        (HIDDEN, "num_positions"),
        (HIDDEN, "blob"),
    ):
        CASES[f"null in {folder.split('/')[0]} {name}"] = lambda p, f=folder, n=name: rewrite(
            part(p, f), with_column(n, lambda values: [None, *values[1:]])
        )
    for token in (50, 2**31 - 1, -1, -(2**31)):
        CASES[f"token id {token}"] = lambda p, t=token: _token(part(p, "sequences"), t)
    CASES["row_keys all equal"] = lambda p: rewrite(
        part(p, "sequences"), with_column("row_key", lambda values: [values[0]] * len(values))
    )
    for value in (float("nan"), float("inf"), 1e300, -5.0):
        CASES[f"teacher_nll_nats {value}"] = lambda p, v=value: rewrite(
            part(p, TARGETS), with_column("teacher_nll_nats", lambda values: [v, *values[1:]])
        )
    CASES["blobs exchanged"] = lambda p: rewrite(
        part(p, TARGETS), with_column("blob", lambda blobs: [blobs[1], blobs[0], *blobs[2:]])
    )
    for folder in ("sequences", TARGETS, HIDDEN):
        for codec in ("zstd", "lz4"):
            CASES[f"{codec} inside {folder.split('/')[0]}"] = lambda p, f=folder, c=codec: rewrite(
                part(p, f), lambda columns, _: columns, compression=c
            )


def _token(path: Path, token: int) -> None:
    """Put one token id into row 0, with the row's key made to fit."""
    from shared.keys import content_key

    def change(columns: list[pa.Array], schema: pa.Schema) -> list[pa.Array]:
        tokens, spans = columns[schema.get_field_index("token_ids")].to_pylist(), columns[8].to_pylist()
        tokens[0][1] = token
        keys = columns[0].to_pylist()
        keys[0] = content_key(np.array(tokens[0], np.int32), np.array(spans[0], np.int32).reshape(-1, 2))
        columns[0] = pa.array(keys, schema.field(0).type)
        columns[7] = pa.array(tokens, schema.field(7).type)
        return columns

    rewrite(path, change)


def _bombs() -> None:
    big = 300 << 20

    def long_text(values: list[Any]) -> list[Any]:
        return ["A" * big, *values[1:]]

    CASES["response of 300 MiB compressed inside"] = lambda p: rewrite(
        part(p, "sequences"), with_column("response", long_text), compression="zstd"
    )
    CASES["plan of 300 MiB compressed inside"] = lambda p: _plan(p, long_text, "zstd")
    CASES["hidden frame of 700 MiB of zeros"] = lambda p: rewrite(
        part(p, HIDDEN),
        with_column(
            "blob",
            lambda blobs: [zstandard.ZstdCompressor(write_checksum=True).compress(bytes(700 << 20))] * len(blobs),
        ),
    )
    CASES["targets frame of 300 MiB of zeros"] = lambda p: rewrite(
        part(p, TARGETS),
        with_column(
            "blob", lambda blobs: [zstandard.ZstdCompressor(write_checksum=True).compress(bytes(big))] * len(blobs)
        ),
    )
    CASES["frame without content size"] = lambda p: rewrite(
        part(p, TARGETS),
        with_column(
            "blob", lambda blobs: [zstandard.ZstdCompressor(write_content_size=False).compress(bytes(99))] * len(blobs)
        ),
    )
    CASES["record of many lists"] = lambda p: record(p, "sequences").write_bytes(
        b'{"a": [' + b"[]," * (20 << 20) + b"[]]}"
    )
    CASES["record of many brackets"] = lambda p: record(p, "sequences").write_bytes(b"[" * (1 << 20))
    CASES["record above 64 MiB"] = lambda p: os.truncate(record(p, "sequences"), (64 << 20) + 1)
    CASES["cache.json without end"] = lambda p: os.truncate(p / "cache.json", 1 << 40)
    CASES["plan of another request"] = lambda p: _plan_says(p, lambda d: d["request"].update(first=3))
    CASES["plan with rows_per_part 0"] = lambda p: _plan_says(p, lambda d: d.update(rows_per_part=0))
    CASES["plan with odd complete_jobs"] = lambda p: _plan_says(p, lambda d: d.update(complete_jobs=[1, None]))
    CASES["plan with a null"] = lambda p: _plan(p, lambda values: [None, *values[1:]], None)


def _plan(path: Path, change: Callable[[list[Any]], list[Any]], compression: str | None) -> None:
    """Write the plan's first unit again with other prompts."""
    file = plan(path)
    with pa.OSFile(str(file)) as source:
        reader = pa.ipc.open_file(source)
        found, schema = reader.get_batch_with_custom_metadata(0), reader.schema
    i = schema.get_field_index("prompt")
    columns = list(found.batch.columns)
    columns[i] = pa.array(change(columns[i].to_pylist()), schema.field(i).type)
    file.unlink()
    with pa.ipc.new_file(str(file), schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(
            pa.RecordBatch.from_arrays(columns, schema=schema), custom_metadata=dict(found.custom_metadata)
        )


def _plan_says(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = plan(path)
    with pa.OSFile(str(file)) as source:
        reader = pa.ipc.open_file(source)
        batches = [reader.get_batch_with_custom_metadata(i) for i in range(reader.num_record_batches)]
        schema, document = reader.schema, json.loads(reader.schema.metadata[b"decant"])
    assert job_id(document["request"]) == file.parent.name
    change(document)
    text = json.dumps(document).encode()
    schema = schema.with_metadata({b"decant": text, b"xxh3": xxhash.xxh3_128_hexdigest(text).encode()})
    file.unlink()
    with pa.ipc.new_file(str(file), schema) as writer:
        for found in batches:
            writer.write_batch(
                found.batch.replace_schema_metadata(schema.metadata), custom_metadata=dict(found.custom_metadata)
            )


def _special_files() -> None:
    files: dict[str, Callable[[Path], Path]] = {
        "cache.json": lambda p: p / "cache.json",
        "layer.json": lambda p: p / TARGETS / "layer.json",
        "record": lambda p: record(p, "sequences"),
        "targets record": lambda p: record(p, TARGETS),
        "part": lambda p: part(p, "sequences"),
        "targets part": lambda p: part(p, TARGETS),
        "hidden part": lambda p: part(p, HIDDEN),
        "plan": plan,
        "tokenizer": lambda p: p / "tokenizer" / "tokenizer.json",
    }
    ways: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "device": lambda f: f.symlink_to("/dev/zero"),
        "link out": lambda f: f.symlink_to("/etc/hostname"),
        "nothing": lambda f: f.symlink_to(f.with_name("missing")),
    }
    for what, find in files.items():
        for way, place in ways.items():
            CASES[f"{way} as {what}"] = lambda p, find=find, place=place: _replaced(find(p), place)
    for folder in ("sequences", "targets", TARGETS, "hidden", HIDDEN, "jobs", "tokenizer"):
        CASES[f"linked {folder.split('-')[0]}"] = lambda p, f=folder: _linked(p / f)


def _replaced(file: Path, place: Callable[[Path], object]) -> None:
    file.unlink()
    place(file)


def _linked(folder: Path) -> None:
    cache = next(parent for parent in folder.parents if (parent / "cache.json").exists())
    away = cache.with_name(f"{cache.name}-{folder.name}-away")
    shutil.move(folder, away)
    folder.symlink_to(away)


def _parts() -> None:
    def twice(path: Path) -> None:
        for folder in ("sequences", TARGETS, DRAWS, HIDDEN):
            old = part(path, folder)
            new = old.with_name(old.name.replace("-000000.", "-000009."))
            shutil.copy(old, new)
            shutil.copy(old.with_suffix(".json"), new.with_suffix(".json"))
            edit(new.with_suffix(".json"), lambda d, new=new: d.update(stem=new.stem))

    CASES["part under a unit that the plan lacks"] = twice
    CASES["part of another layer"] = lambda p: _of_another(p, keep_record=False)
    CASES["part of another layer, record corrected"] = lambda p: _of_another(p, keep_record=True)
    CASES["unknown tokenizer file"] = lambda p: (p / "tokenizer" / "merges.txt").symlink_to("/etc/hostname")
    CASES["tokenizer altered"] = lambda p: (p / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    CASES["part cut"] = lambda p: (os.truncate(part(p, TARGETS), 1000), resign(part(p, TARGETS)))


def _of_another(path: Path, *, keep_record: bool) -> None:
    other, mine = part(path, DRAWS), part(path, TARGETS)
    shutil.copy(other, mine)
    if keep_record:
        resign(mine)
    else:
        shutil.copy(other.with_suffix(".json"), mine.with_suffix(".json"))


for add in (_numbers, _shapes, _columns, _bombs, _special_files, _parts):
    add()
