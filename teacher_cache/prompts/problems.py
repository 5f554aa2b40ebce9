"""Rows that cannot be used: set aside, counted and listed, and fatal only above a share.

One bad row among a million must not cost the other rows, and a wrong column must not pass for a few bad rows. So every
row that cannot be used is added here with its place and reason; `check` fails once they are more than a share of what
was read.
Cost: the list is bounded; counts are exact.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from shared.errors import PromptError

THRESHOLD = 0.01
"""Largest share of unusable rows that a command accepts."""

MAX_LISTED = 1000
"""Problems that are kept in words; the rest are only counted."""


def too_many(unusable: int, rows: int, accepted: float = THRESHOLD) -> bool:
    """Tell whether more than the accepted share of the rows is unusable; a product would refuse 29 of 50 at 0.58."""
    return unusable > 0 and unusable / rows > accepted


def accepting(unusable: int, rows: int) -> float:
    """Return the smallest share, in thousandths, at which so many of the rows are accepted: 5 of 70 -> 0.072."""
    return -(-unusable * 1000 // rows) / 1000


@dataclass(frozen=True, slots=True)
class Problem:
    """One row that was set aside."""

    path: str
    line: int
    reason: str

    def sentence(self) -> str:
        """Return `path:line: reason`."""
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(slots=True)
class Problems:
    """What was set aside so far."""

    listed: list[Problem] = field(default_factory=list)
    """The first of them, in the order in which they were met."""
    total: int = 0
    """Rows set aside."""
    rows_read: int = 0
    """Rows met, good and bad."""
    duplicates: Counter[str] = field(default_factory=Counter)
    """Rows per source that an earlier row of the listing repeats."""
    unread: dict[str, Counter[str]] = field(default_factory=dict)
    """Columns that the format does not read, per source, with the rows that have them."""
    unread_files: list[str] = field(default_factory=list)
    """A sentence for each source beside whose files others lie."""
    idle_names: list[str] = field(default_factory=list)
    """A sentence for names of a source's `ignore` that nothing read has."""

    def add(self, path: str, line: int, reason: str) -> None:
        """Set one row aside; a reason that begins with the row's place is kept without it."""
        self.total += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(Problem(path, line, reason.removeprefix(f"{path}:{line}: ")))

    def notes(self) -> list[str]:
        """Return a sentence for everything that lies in the sources and was not read, or is read and lies in none."""
        columns = [
            f"source {source}: columns that are not read: {', '.join(sorted(counts))}"
            for source, counts in self.unread.items()
            if counts
        ]
        return self.unread_files + columns + self.idle_names

    def check(self, threshold: float = THRESHOLD, way_out: str = "") -> None:
        """Fail when more than `threshold` of the rows were set aside.

        Raises:
            PromptError: with the first problem, the count and what to do, `way_out` besides mending the rows.
        """
        if too_many(self.total, self.rows_read, threshold):
            found = f"{self.total:,} of {self.rows_read:,} rows cannot be used"
            bad = f"{found}, more than the {threshold:.0%} that are set aside"
            raise PromptError(f"{self.listed[0].sentence()} ({bad}); correct or remove them{way_out}")
