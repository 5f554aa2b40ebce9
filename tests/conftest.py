"""What every test needs: the repository's root on the path, so that `tests.tiny_models` imports under any runner, and
no hub.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton decides when it is first imported, by whichever test


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that are slow throughout, so that none of them runs alone at the end, with a core idle."""
    slow: dict[Path, list[bool]] = defaultdict(list)
    for item in items:
        slow[item.path].append(item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -sum(slow[item.path]) / len(slow[item.path]))
