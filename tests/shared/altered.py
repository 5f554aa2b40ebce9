"""Files of a cache altered by somebody who makes every checksum agree with the change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from shared.parts.records import sealed_json


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a sealed JSON file and seal it again."""
    document = json.loads(path.read_text())
    change(document)
    path.write_bytes(sealed_json(document))


def resign(part: Path) -> None:
    """Make a part's record fit the part's bytes."""
    data = part.read_bytes()
    edit(part.with_suffix(".json"), lambda d: d.update(bytes=len(data), xxh3=xxhash.xxh3_128_hexdigest(data)))


def rewrite(part: Path, change: Callable[[list[pa.Array], pa.Schema], list[pa.Array]], **options: Any) -> None:
    """Replace a part's columns, with its record made to fit."""
    with pa.OSFile(str(part)) as source:
        table = pa.ipc.open_file(source).read_all().combine_chunks()
    columns = change([column.chunk(0) for column in table.columns], table.schema)
    part.unlink()
    with pa.ipc.new_file(str(part), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=table.schema))
    resign(part)


def with_column(
    name: str, change: Callable[[list[Any]], list[Any]]
) -> Callable[[list[pa.Array], pa.Schema], list[pa.Array]]:
    """Return a change of one column's values."""

    def changed(columns: list[pa.Array], schema: pa.Schema) -> list[pa.Array]:
        i = schema.get_field_index(name)
        columns[i] = pa.array(change(columns[i].to_pylist()), schema.field(i).type)
        return columns

    return changed
