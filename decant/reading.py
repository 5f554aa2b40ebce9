"""A cache as a sequence of rows: index, slice, iterate, look, hand to pandas.

Cost: a row is decoded when it is asked for (tens of microseconds); a slice is a view and reads nothing.

Shape letters: R rows, T tokens of a row, S its supervised positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from shared.cache.cache import Cache as StoredCache
from shared.cache.cache import Row as StoredRow
from shared.errors import CacheError
from shared.identity.identity import LayerIdentity
from shared.places import named, place_of
from shared.text.printable import printable
from tools.cache.cache_show import row_document, row_text


class Row:
    """One row: `token_ids` int32 [T], `spans` [n, 2], `source`, `prompt`, `response`, `targets` and the other fields of
    a stored row; `show` writes it out.

    >>> row = open_cache("data/golden/run-1/cache")[0]
    >>> row.source, row.num_positions, len(row.targets.counts)
    ('math', 2, 2)
    """

    def __init__(self, cache: StoredCache, index: int) -> None:
        """Read row `index` of a cache."""
        self._cache, self.index = cache, index
        self._stored: StoredRow = cache[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_stored" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._stored, name)

    def __repr__(self) -> str:
        tokens, positions = len(self._stored.token_ids), self._stored.num_positions
        return f"<row {self.index}: {self._stored.source}, {tokens} tokens, {positions} supervised>"

    def text(self, alternatives: int = 5) -> str:
        """Return the row token by token, each with its probability and what else the teacher would have said."""
        return row_text(row_document(self._cache, self.index, alternatives))

    def show(self, alternatives: int = 5) -> None:
        """Print `text(alternatives)`."""
        print(printable(self.text(alternatives)))


class Cache(Sequence[Row]):
    """A cache, or a slice of one, as a sequence of rows."""

    def __init__(self, stored: StoredCache, rows: Sequence[int] | None = None) -> None:
        """Show the given rows of a cache, or all of them."""
        self.stored = stored
        self._rows: Sequence[int] = range(len(stored)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Cache: ...
    def __getitem__(self, index: int | slice) -> Row | Cache:
        """Return a row, or a view of some without reading them.

        >>> cache = open_cache("data/golden/run-1/cache")
        >>> len(cache), len(cache[4:10]), cache[4:10][0].index, cache[-1].index
        (24, 6, 4, 23)
        """
        if isinstance(index, slice):
            return Cache(self.stored, self._rows[index])
        try:
            return Row(self.stored, self._rows[index])
        except IndexError:
            raise IndexError(f"row {index} of {len(self)}") from None

    def __iter__(self) -> Iterator[Row]:
        return (Row(self.stored, i) for i in self._rows)

    def __repr__(self) -> str:
        return f"<cache {named(self.stored.path)}: {len(self):,} rows, layer {self.stored.layer_name}>"

    @property
    def path(self) -> Path:
        """The cache's directory."""
        return self.stored.path

    @property
    def row_numbers(self) -> Sequence[int]:
        """[R] places of these rows in the whole cache."""
        return self._rows

    @property
    def sources(self) -> dict[str, int]:
        """Rows of each source.

        >>> open_cache("data/golden/run-1/cache").sources
        {'math': 24}
        """
        counts = Counter(self.stored.sources[list(self._rows)].tolist())
        return {name: counts[code] for code, name in enumerate(self.stored.source_names) if counts[code]}

    @property
    def layers(self) -> dict[str, LayerIdentity]:
        """Every targets layer by its full name, with the teacher and the capture that made it.

        >>> layers = open_cache("data/golden/run-1/cache").layers
        >>> [(name, layer.k, layer.draws, layer.temperatures) for name, layer in layers.items()]
        [('top6-sample3-2c488e40', 6, 3, (1.0, 2.0))]
        """
        return self.stored.layers()

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures at which the opened layer's tails are exact; none without a layer."""
        return self.stored.layer.temperatures if self.stored.layer else ()

    def to_pandas(self, rows: Iterable[int] | None = None) -> Any:
        """Return a DataFrame of texts and sizes, one line a row: all rows, or those at the given places.

        Columns: row, source, prompt, response, reference, finish_reason, num_tokens, num_positions and, with a layer,
        teacher_nll_nats, the mean negative log-probability of the answer's tokens under the teacher.

        >>> open_cache("data/golden/run-1/cache").to_pandas(range(3))[["source", "num_tokens"]].shape
        (3, 2)
        """
        import pandas as pd

        chosen = self if rows is None else (self[i] for i in rows)
        return pd.DataFrame([_plain(row) for row in chosen])


def open_cache(path: Path | str, targets: str | None = None, hidden: str | bool = False) -> Cache:
    """Open a cache for reading.

    Args:
        path: its directory, or its URL (s3, gs, hf, https), whose parts are fetched as they are read.
        targets: NAME or NAME-HASH8 of a targets layer; None for the only one.
        hidden: NAME of a hidden layer, True for the only one, False to read none.

    Raises:
        CacheError: there is no cache, no such layer, or several and none named.

    >>> open_cache("data/golden/run-1/cache")
    <cache data/golden/run-1/cache: 24 rows, layer top6-sample3-2c488e40>
    """
    try:
        place = place_of(path)
    except ValueError as error:
        raise CacheError(str(error)) from None
    return Cache(StoredCache.open(place, targets, hidden=hidden))


def _plain(row: Row) -> dict[str, Any]:
    texts = ("source", "prompt", "response", "reference", "finish_reason")
    line = {"row": row.index, **{name: getattr(row, name) for name in texts}}
    line |= {"num_tokens": len(row.token_ids), "num_positions": row.num_positions}
    if row.targets is not None:
        line["teacher_nll_nats"] = -float(row.targets.label_logprobs.mean())
    return line
