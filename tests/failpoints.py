"""Every fail-point of phase 1, named by its writer and the step (shared/process/failpoints.py)."""

from itertools import product

ATOMIC_STEPS = ("write", "fsync", "rename", "fsync_dir")
"""Steps of every atomically written file, in order."""

WRITTEN_FILES = ("cache_json", "tokenizer", "layer_json", "sequences", "sequences_record", "targets", "targets_record")
"""What phase 1 writes by temporary file, fsync and rename."""


def failpoint_names() -> tuple[str, ...]:
    """List every fail-point of phase 1, in the order in which a build meets them."""
    atomic = (f"{what}.{when}_{step}" for what, step, when in product(WRITTEN_FILES, ATOMIC_STEPS, ("before", "after")))
    linked = (f"plan.{when}_{step}" for step in ("write", "fsync", "link", "fsync_dir") for when in ("before", "after"))
    made = (f"directory.{when}_{step}" for step in ("mkdir", "fsync_dir") for when in ("before", "after"))
    return (*made, *linked, *atomic)
