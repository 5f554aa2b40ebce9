"""Commit records: the small JSON beside each part, whose presence is the part's commit.

Cost: one file of a few kilobytes per part, read once. What a reader needs of a record is kept as it is, its figures and
    versions as
the text they came in, zlib-compressed, and parsed when they are asked for: a record takes half a kilobyte instead of
several.
"""

from __future__ import annotations

import builtins
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import CacheError, DamagedError
from shared.schema import FORMAT_VERSION, MAX_JSON_BYTES, MAX_ROWS_PER_PART, STEM_PATTERN


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

    @property
    def stats(self) -> dict[str, Any]:
        """Figures of the part's rows."""
        return dict(self._detail("stats", {}))

    @property
    def software(self) -> dict[str, Any]:
        """Versions of what made the part."""
        return dict(self._detail("software", {}))

    @property
    def set_aside(self) -> list[dict[str, Any]]:
        """Rows of the plan's unit that this part leaves out, each with a `reason`."""
        return list(self._detail("set_aside", []))

    def _detail(self, name: str, missing: Any) -> Any:
        return json.loads(zlib.decompress(self.details))[name] if self.details else missing

    @property
    def id8(self) -> str:
        """First 8 digits of the job that the part belongs to."""
        return self.stem[5:13]


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """Return a document as indented JSON with sorted keys and a final newline."""
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass") + b"\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Raises:
        DamagedError: it is missing, too large, or no JSON object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise DamagedError(f"{path} has {size} bytes where at most {MAX_JSON_BYTES} are expected")
        document = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not JSON ({error}); it was altered after it was written") from None
    if not isinstance(document, dict):
        raise DamagedError(f"{path} holds a {type(document).__name__} where a JSON object is expected")
    return document


def read_record(path: Path) -> PartRecord:
    """Read one commit record.

    Raises:
        DamagedError: it contradicts the format.
    """
    document = read_json(path)
    wanted = {"stem": str, "rows": int, "positions": int, "bytes": int, "xxh3": str, "stats": dict, "software": dict}
    for name, kind in wanted.items():
        if not isinstance(document.get(name), kind):
            raise DamagedError(f"{path} says {name}: {document.get(name)!r} where a {kind.__name__} is expected")
    if document.get("format") != FORMAT_VERSION:
        raise CacheError(
            f"{path} has format {document.get('format')!r} and this version of Decant reads format {FORMAT_VERSION}; "
            "use the version that wrote it"
        )
    set_aside = document.get("set_aside", [])
    if not isinstance(set_aside, list) or not all(isinstance(item, dict) for item in set_aside):
        raise DamagedError(f"{path} says set_aside: where a list of objects is expected")
    if document["stem"] != path.stem or not 0 <= document["rows"] <= MAX_ROWS_PER_PART or document["positions"] < 0:
        raise DamagedError(
            f"{path} describes {document['stem']} with {document['rows']} rows; it is another part's record"
        )
    details = json.dumps(
        {"stats": document["stats"], "software": document["software"], "set_aside": set_aside}, separators=(",", ":")
    )
    plain = {name: document[name] for name in ("stem", "rows", "positions", "bytes", "xxh3")}
    return PartRecord(**plain, details=zlib.compress(details.encode(), 1))


def list_records(directory: Path) -> list[PartRecord]:
    """Return the records of a directory's committed parts, by stem; none where the directory is missing.

    Raises:
        DamagedError: a record contradicts the format.
    """
    if not directory.is_dir():
        return []
    stems = sorted(path.stem for path in directory.glob("part-*.json") if STEM_PATTERN.fullmatch(path.stem))
    return [read_record(directory / f"{stem}.json") for stem in stems]
