"""Which rows of the committed parts a reader shows: every row_key once, also after two builds at the same time.

A plan leaves out what was committed when it was made, so only jobs of which neither plan remembers the other as
complete can share a row. For those alone the row_key columns are read, and of equal keys the row of the lowest job id,
then part, is shown. Everywhere else this costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.cache.layout import sequences_dir
from shared.parts.jobs import list_jobs
from shared.parts.records import PartRecord
from shared.parts.repeated_rows import repeated_rows


def overlapping_jobs(cache_dir: Path, records: Sequence[PartRecord]) -> set[str]:
    """Return the first 8 digits of jobs whose parts may share rows with another job's.

    A part whose job has no plan here (it came from another cache) may share rows with every other.
    """
    ids = sorted({record.id8 for record in records})
    risky: set[str] = set()
    if len(ids) < 2:
        return risky
    jobs = {job.id8: job for job in list_jobs(cache_dir)}
    for a, b in combinations(ids, 2):
        if a in jobs and b in jobs:
            first, second = jobs[a], jobs[b]
            if first.id in second.complete_jobs or second.id in first.complete_jobs:
                continue
        risky |= {a, b}
    return risky


def hidden_rows(cache_dir: Path, records: Sequence[PartRecord]) -> dict[str, NDArray[np.bool_]]:
    """Return, for each of the sequences parts, by stem, that has rows to hide, its stem and a mask [R] of the rows to
    show.

    Raises:
        DamagedError: a part or plan contradicts the format.
    """
    risky = overlapping_jobs(cache_dir, records)
    chosen = [record for record in records if record.id8 in risky and record.rows]  # by stem: by job, then unit
    directory = sequences_dir(cache_dir)
    repeats = repeated_rows([(directory, record) for record in chosen])
    return {chosen[number].stem: ~repeated for number, repeated in repeats.items()}
