"""A cache that a command makes of something else: one job names it, whose plan is empty because nothing is left to do.

The job's id hashes what was asked and of what, so that the same command finds its finished cache or continues a killed
one, and no other does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.parts.jobs import create_job, job_id
from tools.cache.staged_directory import claim, publish, refuse_existing, staging_path


@dataclass(frozen=True, slots=True)
class DerivedCache:
    """Where a command's cache is, or is written."""

    out: Path
    request: Mapping[str, Any]
    job: str
    existed: bool
    """Whether `out` holds it already."""
    path: Path
    """`out` where it existed, else the directory beside it that will be renamed."""

    @classmethod
    def of(cls, out: Path, doing: str, wanted: str, request: Mapping[str, Any]) -> DerivedCache:
        """Look for a cache.

        Args:
            out: where it is to be.
            doing: the word of the directory beside it, such as `merging`.
            wanted: what it is, for the message.
            request: equal ones are the same cache.

        Raises:
            CacheError: `out` is something else.
        """
        job = job_id(request)
        existed = (out / "cache.json").is_file() and _proof(out, job).is_file()
        if not existed:
            refuse_existing(out, wanted)
        return cls(out, request, job, existed, out if existed else staging_path(out, doing, job))

    def stem(self, number: int) -> str:
        """Return the name of its part `number`."""
        return f"part-{self.job[:8]}-{number:06d}"

    def claim(self) -> None:
        """Take the directory that is written for this process alone.

        Raises:
            CacheError: another process of the same command writes it.
        """
        claim(self.path)

    def plan(self) -> None:
        """Write the job with its empty plan."""
        create_job(self.path, self.request, (), 1)

    def publish(self) -> None:
        """Give the finished cache its name."""
        publish(self.path, self.out, _proof(self.out, self.job))


def _proof(out: Path, job: str) -> Path:
    return out / "jobs" / job / "plan.arrow"
