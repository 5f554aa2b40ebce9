"""The small JSON files that a stage keeps about itself, read back as they were written or refused by name.

They lie in directories that people copy and that other machines write, so any of them may be cut, emptied or another's.
Cost: one small file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.errors import TrainingError, refused
from shared.text import strict_json

MAX_BYTES = 2**26


def read_kept(path: Path, *needs: str) -> dict[str, Any]:
    """Return the object that a file of a stage holds.

    Args:
        path: the file.
        needs: keys that it must have.

    Raises:
        TrainingError: it cannot be read, or holds something else.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise ValueError("it is no file of a size that is written there")
        found = strict_json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or any(name not in found for name in needs):
            raise ValueError(f"it holds no object{' with ' + ' and '.join(needs) if needs else ''}")
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {refused(error)}") from None
    except ValueError as error:
        raise TrainingError(
            f"{path} is not what a training wrote there ({error}); put it back from a copy, or rename {path.parent} "
            "to train again what is in it"
        ) from None
    return found
