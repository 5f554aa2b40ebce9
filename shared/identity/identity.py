"""Is this the same tokenizer, the same teacher, the same capture?

Identity is what makes two targets layers, or two sets of sequences, the same thing; provenance (engine, library
versions, machine) is recorded but never compared. A difference is explained in a sentence with both values, before any
work. A field that is added is declared with `shared.identity.grown.grown`, which keeps the hash of everything older.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, Self

import xxhash
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from shared.errors import DamagedError
from shared.identity.grown import grown
from shared.keys import canonical_json
from shared.payload.codec import CODEC_NAME, Codec

Size = Annotated[int, Field(ge=0, lt=2**31)]
"""A number of entries, layers or components; no real one comes near the end."""
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""How identities are read: no conversions, no unknown fields, finite numbers."""


class Identity:
    """Base of the dataclasses that say what something on disk is."""

    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    what: ClassVar[str]
    """How messages call the thing."""
    provenance: ClassVar[frozenset[str]] = frozenset({"teacher"})
    """Fields that are recorded and never compared: where the weights lie is not what they are."""

    @property
    def hash8(self) -> str:
        """8 hexadecimal digits that stand for the whole identity, its provenance left out."""
        document = {name: value for name, value in self.to_json().items() if name not in self.provenance}
        return xxhash.xxh3_128_hexdigest(canonical_json(document))[:8]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, without grown fields at their default.

        A layer of mode top whose grown `draw_key` is still "context" gives the document, and the hash, that it had
        before the field.
        """
        values = {f.name: (getattr(self, f.name), f) for f in fields(self)}  # type: ignore[arg-type]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, (value, f) in values.items()
            if not (f.metadata.get("grown") and value == f.default)
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: str) -> Self:
        """Rebuild an identity; a field that is missing means its default, one that is unknown is refused unless it is
        null; `where` names its file in errors.

        Raises:
            DamagedError: a field is missing without a default, unknown, of another type or out of range.
        """
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        said = {name: value for name, value in document.items() if name in known or value is not None}
        try:
            return TypeAdapter(cls).validate_json(canonical_json(said), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] in ("missing", "unexpected_keyword_argument"):
                raise DamagedError(
                    f"{where} has missing or unknown fields ({name}); it was altered or written by a later version, "
                    "which reads it"
                ) from None
            raise DamagedError(
                f"{where} says {name}: {str(first['input'])[:80]!r}, which does not fit: {first['msg']}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DamagedError(
                f"{where} is no identity ({str(error)[:80]}); it was altered after it was written"
            ) from None


def layer_short_name(captured: Any) -> str:
    """Return the default name of a layer by a capture's mode, k and draws: top64, sample12, top8-sample4."""
    parts = {
        "top": f"top{captured.k}",
        "sample": f"sample{captured.draws}",
        "top+sample": f"top{captured.k}-sample{captured.draws}",
    }
    return parts.get(captured.mode, str(captured.mode))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerIdentity(Identity):
    """Which teacher, captured how: the identity of one targets layer."""

    what: ClassVar[str] = "targets layer"

    teacher: str
    """Path or hub id as the recipe named it."""
    weights_hash: str
    tokenizer_hash: str
    vocab_size: Size
    """Entries of the teacher's head; every id lies below it."""
    mode: str
    """top, sample or top+sample."""
    k: Size
    """Most head entries per position; 0 in mode sample."""
    draws: Size = 0
    """Tokens drawn per position and temperature; 0 in mode top."""
    mass: float = 1.0
    temperatures: tuple[float, ...] = (1.0,)
    gap_step: float = 0.0625
    codec: str = CODEC_NAME
    dtype: str = "bfloat16"
    head_dtype: str = "float32"
    revision: str | None = None
    quantization: str | None = None
    adapter: str | None = None
    """Hash of the adapter's weights."""
    draw_key: Literal["context", "row"] = grown("context")
    """What keys a position's draws: the tokens before it, or its row as well (all that are begun now)."""
    derived_from: str = grown("")
    """NAME-HASH8 of the layer in the teacher's tokenizer that it was made from; empty where the teacher wrote it."""
    method: str = grown("")
    """Rule by which a derived layer was made."""
    tail: Literal["exact", "derived", "unknown"] = grown("exact")
    """Mass outside the head: of the teacher's own softmax; 1 minus what others rounded and stored; or not known at
    all, and then the head is known up to a factor."""
    labels: Literal["all", "head"] = grown("all")
    """Not `label`: which labels' log-probabilities the layer knows at all. `head`, of targets that others made: only of
    those in the head, and -inf stands for not known."""
    label: Literal["apart", "head"] = grown("apart")
    """Not `labels`: whether the label, the token that follows, is an entry of the head also where it would be outside
    of it (`head`), or has its log-probability beside the head alone (`apart`)."""

    @property
    def name(self) -> str:
        """Short default name: top64, sample12 or top8-sample4."""
        return layer_short_name(self)

    @property
    def most_entries(self) -> int:
        """Most head entries of a position: k, and the label where it belongs to the head."""
        return self.k + (self.label == "head")

    def make_codec(self) -> Codec:
        """Return the codec of the layer's blobs.

        Raises:
            DamagedError: another codec, or settings out of range.
        """
        if self.codec != CODEC_NAME:
            raise DamagedError(f"the layer's codec is {self.codec!r} and this version of Decant knows {CODEC_NAME!r}")
        if self.mode not in ("top", "sample", "top+sample") or not 0 < self.mass <= 1:
            raise DamagedError(f"the layer's identity is impossible: mode {self.mode[:40]!r} with mass {self.mass}")
        try:
            return Codec(self.gap_step, self.temperatures, self.draws, self.vocab_size, self.most_entries)
        except ValueError as error:
            raise DamagedError(f"the layer's identity is impossible: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencesIdentity(Identity):
    """What all rows of a cache share. Licence and origin of the answers are provenance: recorded, not compared."""

    what: ClassVar[str] = "cache"
    provenance: ClassVar[frozenset[str]] = frozenset({"licence", "answers", "tokenizer", "answerer"})

    tokenizer_hash: str
    vocab_size: Size
    """Ids lie below it."""
    template: str = ""
    """Hash of the default chat template."""
    tokenizer: str = ""
    """Where the tokenizer came from."""
    licence: str | None = None
    """Licence under which the answers may be used."""
    answers: str | None = None
    """Who wrote the answers."""
    groups: Literal["prompt", "first question"] = grown("prompt")
    """Rule of the group keys (shared/cache/groups.py); a cache keeps the rule that it began with."""
    answerer: str = grown("")
    """Weights of the teacher whose answers' row_keys leave the model out, those that the cache began with; other
    models' keys hold it. Empty: what the cache's jobs say, as for caches that were begun before the field."""


def difference(found: Identity, wanted: Identity, here: object = None, there: object = "the request") -> str | None:
    """Return a clause that names the first field in which two identities differ, with both values and their places;
    None where they agree. `here` left out is "this cache" or "this targets layer".

    Raises:
        TypeError: the identities are of two kinds.
    """
    if type(found) is not type(wanted):
        raise TypeError(f"a {type(found).__name__} cannot be compared with a {type(wanted).__name__}")
    for name in (f.name for f in fields(found) if f.name not in found.provenance):  # type: ignore[arg-type]
        a, b = getattr(found, name), getattr(wanted, name)
        if a != b:
            return f"{name} is {a!r} in {here or f'this {found.what}'} and {b!r} in {there}"
    return None
