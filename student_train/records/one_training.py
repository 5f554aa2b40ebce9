"""One training at a time in a stage's directory: a second one would remove checkpoints that the first is writing, and
cut its metrics.

Whoever trains holds a lock on a file of the directory, which ends with the process, however that ends. Workers that
read for a killed training hold it for the seconds in which they notice, so a second one waits a little before it is
refused. Cost: a file of no bytes.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path

from shared.errors import TrainingError, refused

LOCK_FILE = ".training.lock"
WAIT_SECONDS = 10.0
"""For what a killed training leaves behind to end."""
_PAUSE_SECONDS = 0.1


@contextmanager
def only_training(stage_dir: Path) -> Iterator[None]:
    """Hold a stage's directory.

    Raises:
        TrainingError: another process trains the stage, or the lock cannot be written.
    """
    path = stage_dir / LOCK_FILE
    try:
        file = path.open("ab")  # for writing, or network file systems refuse the lock
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {refused(error)}") from None
    with file:
        _lock(file, stage_dir)
        yield


def _lock(file: BufferedWriter, stage_dir: Path) -> None:
    last_try = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < last_try:
                time.sleep(_PAUSE_SECONDS)
                continue
            raise TrainingError(
                f"{stage_dir} is trained by another process; let it end or stop it, then run the same command again, "
                "which takes what it made or goes on from there"
            ) from None
        except OSError:  # a file system without locks
            return
        return
