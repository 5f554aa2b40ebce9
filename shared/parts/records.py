"""Commit records: the small JSON beside each part, whose presence is its commit; and how JSON says that it is whole.

A JSON file that Decant writes carries `checksum`, the xxh3-128 of its own text with the checksum's digits as zeros.
Files of versions without it are accepted. Every field is checked for kind and range as it is read, so no figure is of
another shape. Cost: one file of a few kilobytes per part, read once. What a reader needs of a record is kept as it
is, its figures and versions as the text they came in, zlib-compressed, and parsed when they are asked for: a record
takes half a kilobyte instead of several.
"""

from __future__ import annotations

import builtins
import json
import re
import reprlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, Field, ValidationError

from shared.errors import CacheError, DamagedError
from shared.parts.cache_files import list_folder, parse_json, read_bounded
from shared.parts.part_stats import STATS_OF, Strict
from shared.schema import (
    FORMAT_VERSION,
    MAX_JSON_BYTES,
    MAX_PART_BYTES,
    MAX_ROWS_PER_PART,
    MAX_TOKENS_PER_ROW,
    STEM_PATTERN,
)

_CHECKSUM = re.compile(rb'\n "checksum": "([0-9a-f]{32})"')
"""Within sealed JSON: at the first level of indentation, where no text of a value can stand."""
_UNSEALED = b'\n "checksum": "' + b"0" * 32 + b'"'
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


@dataclass(frozen=True, slots=True)
class PartRecord:
    """What a commit record says about its part."""

    stem: str
    """File name without its ending."""
    rows: int
    positions: int
    """Supervised positions of all rows."""
    bytes: int
    """Size of the Arrow file."""
    xxh3: str
    """xxh3-128 of the Arrow file in hexadecimal."""
    details: builtins.bytes = b""
    """`stats`, `software` and `set_aside` as compressed JSON."""
    layer: str | None = None
    """HASH8 of the layer that the part is of; None for sequences and for parts of versions that did not say."""

    @property
    def stats(self) -> dict[str, Any]:
        """Figures of the part's rows."""
        return dict(self._details.get("stats", {}))

    @property
    def software(self) -> dict[str, Any]:
        """Versions of what made the part."""
        return dict(self._details.get("software", {}))

    @property
    def set_aside(self) -> list[dict[str, Any]]:
        """Rows of the plan's unit that this part leaves out, each with a `reason`."""
        return list(self._details.get("set_aside", []))

    def content(self) -> dict[str, Any]:
        """Return what the Arrow file repeats in its metadata."""
        return {"rows": self.rows, "positions": self.positions, **self._details}

    @property
    def _details(self) -> dict[str, Any]:
        return dict(json.loads(zlib.decompress(self.details))) if self.details else {}

    @property
    def id8(self) -> str:
        """First 8 digits of the job that the part belongs to."""
        return self.stem[5:13]


class _Document(Strict):
    """A commit record's fields."""

    format: int
    stem: str
    rows: int = Field(ge=0, le=MAX_ROWS_PER_PART)
    positions: int = Field(ge=0, le=MAX_ROWS_PER_PART * MAX_TOKENS_PER_ROW)
    bytes: int = Field(ge=0, le=MAX_PART_BYTES)
    xxh3: _Hash
    stats: dict[str, Any]
    software: dict[str, Any]
    set_aside: list[dict[str, Any]] = Field([])
    layer: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")] | None = None


def kind_of(directory: Path) -> str:
    """Return what a directory's parts are: sequences, targets or hidden."""
    if directory.name == "sequences":
        return "sequences"
    return "hidden" if directory.parent.name == "hidden" else "targets"


def layer_of(directory: Path) -> str | None:
    """Return the HASH8 that a layer's directory is named by; None for sequences."""
    return None if kind_of(directory) == "sequences" else directory.name[-8:]


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """Return a document as indented JSON with sorted keys and a final newline."""
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass") + b"\n"


def sealed_json(document: Mapping[str, Any]) -> bytes:
    """Return `json_bytes` of a document with a checksum of itself; one that it has is replaced."""
    data = json_bytes({**document, "checksum": "0" * 32})
    digest = xxhash.xxh3_128_hexdigest(data).encode()
    return data.replace(_UNSEALED, _UNSEALED.replace(b"0" * 32, digest), 1)


def read_sealed(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    """Read a JSON file of a cache; return its fields without the checksum, which is compared where there is one.

    Raises:
        CacheError: a file of another format version.
        DamagedError: it cannot be read, has other fields, or is not what was written.
    """
    return parse_sealed(read_bounded(path, MAX_JSON_BYTES), path, model)


def parse_sealed(data: bytes, path: object, model: type[BaseModel] | None = None) -> dict[str, Any]:
    """Return what `read_sealed` does, of bytes that came from `path`; None lets every field through."""
    document = parse_json(data, path)
    if document.get("format") != FORMAT_VERSION or isinstance(document.get("format"), bool):
        raise CacheError(
            f"{path} has format {document.get('format')!r} and this version of Decant reads format {FORMAT_VERSION}; "
            "use the version that wrote it"
        )
    unknown = sorted(document.keys() - {*model.model_fields, "checksum"}) if model is not None else []
    if unknown:
        raise DamagedError(
            f"{path} says {unknown[0][:60]!r}, which this version of Decant does not know; "
            "restore it from a copy, or use the version that wrote it"
        )
    if document.pop("checksum", None) is not None:
        found = _CHECKSUM.findall(data)
        plain = _CHECKSUM.sub(_UNSEALED, data, count=1)
        if len(found) != 1 or xxhash.xxh3_128_hexdigest(plain).encode() != found[0]:
            raise DamagedError(
                f"{path} does not fit its own checksum; it was altered after it was written: restore it from a copy"
            )
    if model is not None:
        checked_model(model, document, path)
    return document


def checked_model(model: type[BaseModel], document: Mapping[str, Any], where: object) -> None:
    """Compare a document with a strict model.

    Raises:
        DamagedError: a field is missing, unknown, of another kind or out of range.
    """
    try:
        model.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise DamagedError(
            f"{where} says {name}: {_shown(first['input'])!r}; {first['msg'][:200]}; it was altered"
        ) from None


def _shown(value: Any) -> str:
    """Return the beginning of a value; nested ones may be endless, and an integer longer than Python writes."""
    try:
        return (value if isinstance(value, str) else reprlib.repr(value))[:60]
    except ValueError:
        return "an integer of thousands of digits"


def read_record(path: Path) -> PartRecord:
    """Read one commit record.

    Raises:
        DamagedError: it contradicts the format, or is of a part of another layer.
    """
    return parse_record(read_bounded(path, MAX_JSON_BYTES), path)


def parse_record(data: bytes, path: Path) -> PartRecord:
    """Return what `read_record` does, of bytes that are, or will be, the file `path`."""
    document = parse_sealed(data, path, _Document)
    if document["stem"] != path.stem:
        raise DamagedError(f"{path} describes {document['stem'][:60]!r}; it is another part's record")
    stats = document["stats"]
    checked_model(STATS_OF[kind_of(path.parent)], stats, f"{path}: stats")
    if (stats["rows"], stats["positions"]) != (document["rows"], document["positions"]):
        raise DamagedError(
            f"{path} says other rows or positions than its stats; it was altered: restore it from a copy"
        )
    check_layer(document.get("layer"), path)
    kept = {"stats": stats, "software": document["software"], "set_aside": document.get("set_aside", [])}
    plain = {name: document[name] for name in ("stem", "rows", "positions", "bytes", "xxh3")}
    details = zlib.compress(json.dumps(kept, separators=(",", ":")).encode(), 1)
    return PartRecord(**plain, details=details, layer=document.get("layer"))


def check_layer(layer: str | None, path: Path) -> None:
    """Refuse a part, or its record, that says it is of another layer than its directory.

    Raises:
        DamagedError: it does.
    """
    expected = layer_of(path.parent)
    if layer is not None and layer != expected:
        raise DamagedError(
            f"{path} is of layer {layer[:20]!r} where its directory is of {expected or 'sequences'}; "
            "delete the part with its record and build again, or restore it from a copy"
        )


def check_counts(directory: Path, record: PartRecord, sequences: PartRecord) -> None:
    """Refuse a layer's part that has other rows or positions than its part of sequences.

    Raises:
        DamagedError: it does.
    """
    if (record.rows, record.positions) != (sequences.rows, sequences.positions):
        raise DamagedError(
            f"{directory / record.stem}.json says {record.rows} rows and {record.positions} positions where its "
            f"sequences have {sequences.rows} and {sequences.positions}; delete the part with its record and teach "
            "again"
        )


def list_records(directory: Path) -> list[PartRecord]:
    """Return the records of a directory's committed parts, by stem; none where the directory is missing.

    Raises:
        DamagedError: a record contradicts the format.
    """
    names = [name for name in list_folder(directory) if name.endswith(".json") and STEM_PATTERN.fullmatch(name[:-5])]
    return [read_record(directory / name) for name in names]
