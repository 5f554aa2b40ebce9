"""Where things lie in a cache directory, and its two kinds of identity file.

Every name read from disk or from a user passes a pattern before it becomes part of a path, and no folder may be a
link, so no path leaves the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import Field

from shared.errors import DamagedError, DecantError, NamingError, UsageError
from shared.identity.hidden_identity import HiddenIdentity
from shared.identity.identity import Identity, LayerIdentity, SequencesIdentity
from shared.parts.cache_files import list_folder, read_bounded
from shared.parts.part_stats import Strict
from shared.parts.records import checked_model, parse_sealed, read_sealed
from shared.places import is_url, origin_of, resolved
from shared.remote.transfer import Remote
from shared.schema import (
    LAYER_PATTERN,
    MAX_JSON_BYTES,
    MAX_TOKENIZER_FILE_BYTES,
    MAX_VOCAB_SIZE,
    TOKENIZER_FILE_PATTERN,
)

AnyIdentity = TypeVar("AnyIdentity", bound=Identity, covariant=True)


@dataclass(frozen=True, slots=True)
class CacheHeader:
    """What cache.json says."""

    identity: SequencesIdentity
    tokenizer_files: Mapping[str, Mapping[str, Any]]
    """Name -> bytes and xxh3 of every file of tokenizer/."""


@dataclass(frozen=True, slots=True)
class LayerDirectory(Generic[AnyIdentity]):
    """One directory of targets/ or hidden/."""

    directory: Path
    provenance: Mapping[str, Any]
    identity: AnyIdentity

    kind: ClassVar[str]
    """Name of the folder of its like."""
    identity_of: ClassVar[type[Any]]

    @property
    def full_name(self) -> str:
        """NAME-HASH8, the directory's name."""
        return self.directory.name

    @property
    def short_name(self) -> str:
        """NAME without its hash."""
        return self.directory.name[:-9]

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read a layer.json.

        Raises:
            DamagedError: it contradicts the format or its directory's name.
        """
        path = directory / "layer.json"
        document = read_sealed(path, _LayerHeader)
        identity = cls.identity_of.from_json(document["identity"], f"{path}: identity")
        if identity.hash8 != directory.name[-8:]:
            raise DamagedError(
                f"{path} hashes to {identity.hash8} in a directory named {directory.name}; it was altered"
            )
        return cls(directory, document["provenance"], identity)

    @classmethod
    def all_of(cls, cache_dir: Path) -> dict[str, Self]:
        """Return the layers of this kind in a cache by full name; errors as for `read`."""
        root = cache_dir / cls.kind
        names = [name for name in list_folder(root) if LAYER_PATTERN.fullmatch(name)]
        return {name: cls.read(root / name) for name in names if "layer.json" in list_folder(root / name)}


@dataclass(frozen=True, slots=True)
class Layer(LayerDirectory[LayerIdentity]):
    """One directory of targets/."""

    kind: ClassVar[str] = "targets"
    identity_of: ClassVar[type[Any]] = LayerIdentity


@dataclass(frozen=True, slots=True)
class HiddenLayer(LayerDirectory[HiddenIdentity]):
    """One directory of hidden/."""

    kind: ClassVar[str] = "hidden"
    identity_of: ClassVar[type[Any]] = HiddenIdentity


AnyLayer = TypeVar("AnyLayer", Layer, HiddenLayer)


def sequences_dir(cache_dir: Path) -> Path:
    """Return the directory of sequences parts."""
    return cache_dir / "sequences"


def tokenizer_path(cache_dir: Path, name: str) -> Path:
    """Return the path of a tokenizer file.

    Raises:
        DamagedError: the name would leave the directory or is no plain file name.
    """
    if not TOKENIZER_FILE_PATTERN.fullmatch(name):
        raise DamagedError(
            f"{name!r} is not the name of a tokenizer file; expected letters, digits, '.', '_', '+', '-'"
        )
    return cache_dir / "tokenizer" / name


class _TokenizerFile(Strict):
    """What cache.json says of a tokenizer file."""

    bytes: int = Field(ge=0, le=MAX_TOKENIZER_FILE_BYTES)
    xxh3: str = Field(pattern=r"^[0-9a-f]{32}$")


class _Header(Strict):
    """cache.json, its identity apart."""

    format: int
    identity: dict[str, Any]
    tokenizer_files: dict[str, _TokenizerFile]


class _LayerHeader(Strict):
    """layer.json, its identity apart."""

    format: int
    identity: dict[str, Any]
    provenance: dict[str, Any]


def tokenizer_entries(described: Mapping[str, Any], where: object) -> dict[str, Mapping[str, Any]]:
    """Return size and checksum by name of tokenizer files that a document lists, once each is one of a cache.

    Raises:
        DamagedError: something else.
    """
    for name, entry in described.items():
        tokenizer_path(Path(), name)
        checked_model(_TokenizerFile, entry, f"{where}: tokenizer_files.{name}")
    return dict(described)


def read_header(cache_dir: Path) -> CacheHeader:
    """Read cache.json.

    Raises:
        CacheError: there is no cache, or one of another format version.
        DamagedError: it contradicts the format.
    """
    path = cache_dir / "cache.json"
    if not path.exists() and not path.is_symlink():
        raise NamingError(
            f"{cache_dir} is not a cache (it has no cache.json); build one with 'decant teach' or correct the path"
        )
    return parse_header(read_bounded(path, MAX_JSON_BYTES), path)


def parse_header(data: bytes, path: object) -> CacheHeader:
    """Return what `read_header` does, of bytes that came from `path`."""
    document = parse_sealed(data, path, _Header)
    files = tokenizer_entries(document["tokenizer_files"], path)
    identity = SequencesIdentity.from_json(document["identity"], f"{path}: identity")
    if not 0 < identity.vocab_size <= MAX_VOCAB_SIZE:
        raise DamagedError(
            f"{path} says vocab_size {identity.vocab_size} where 1 to {MAX_VOCAB_SIZE} are possible; it was altered"
        )
    return CacheHeader(identity, files)


def list_layers(cache_dir: Path) -> dict[str, Layer]:
    """Return the targets layers of a cache by full name; errors as for `Layer.read`."""
    return Layer.all_of(cache_dir)


def list_hidden_layers(cache_dir: Path) -> dict[str, HiddenLayer]:
    """Return the hidden layers of a cache by full name; errors as for `HiddenLayer.read`."""
    return HiddenLayer.all_of(cache_dir)


def all_layers(cache_dir: Path) -> list[Layer | HiddenLayer]:
    """Return the layers of both kinds; errors as for `Layer.read`."""
    return [*list_layers(cache_dir).values(), *list_hidden_layers(cache_dir).values()]


def choose_layer(
    layers: Mapping[str, AnyLayer], wanted: str | None, cache_dir: Path, kind: str = "targets"
) -> AnyLayer | None:
    """Return the layer that a name means: NAME or NAME-HASH8, or the only one; None where there is none and none is
    wanted. Messages name `cache_dir` and `kind`, targets or hidden.

    Raises:
        CacheError: no such layer, or several that fit.
    """
    listed = ", ".join(layers) or "none"
    if wanted is None:
        if len(layers) > 1:
            found = f"{len(layers)} {kind} layers ({listed})"
            raise NamingError(f"{cache_dir} has {found}; name the one to use as `{kind}`")
        return next(iter(layers.values()), None)
    fitting = [layer for layer in layers.values() if wanted in (layer.full_name, layer.short_name)]
    if len(fitting) != 1:
        found = f"no {kind} layer" if not fitting else f"{len(fitting)} {kind} layers"
        raise NamingError(
            f"{cache_dir} has {found} named {wanted!r} (there are: {listed}); give one of these names in full"
        )
    return fitting[0]


def refuse_within_cache(place: Path | str, coming: Sequence[Path] = ()) -> None:
    """Refuse a place in the directory of a cache, or below its URL, where no export, run or other cache belongs;
    the cache's own place is not in it. Cost: two looks, or one small request, per folder above it.

    Args:
        place: a path, a mirror or a URL.
        coming: directories of caches that may not be there yet.

    Raises:
        UsageError: it is one.
    """
    url = place if is_url(place) else origin_of(Path(place))
    if url is None:
        caches = {resolved(path) for path in coming}
        parents = resolved(place).parents
        above = [str(parent) for parent in parents if parent in caches or _is_cache(parent)]
    else:
        above = [parent for parent in _folders_above(str(url)) if _is_cache_at(parent)]
    if above:
        raise UsageError(f"{url or place} lies in the cache {above[0]}, where nothing else belongs; name another place")


def _is_cache(path: Path) -> bool:
    return (path / "cache.json").is_file() and (path / "sequences").is_dir()


def _folders_above(url: str) -> list[str]:
    """Return the URLs above one: of `s3://bucket/a/b` those of `a` and of the bucket."""
    scheme, _, rest = url.partition("://")
    parts = rest.rstrip("/").split("/")
    return [f"{scheme}://{'/'.join(parts[:count])}" for count in range(len(parts) - 1, 0, -1)]


def _is_cache_at(url: str) -> bool:
    """Tell whether a cache is at a URL; a place that may not be asked, as one above one's own may be, holds none."""
    try:
        parse_header(Remote(url).read("cache.json"), f"{url}/cache.json")
    except (FileNotFoundError, DecantError):
        return False
    return True
