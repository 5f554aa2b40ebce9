"""How torch's allocator takes memory of a GPU while a stage trains.

Segments that grow instead of new ones beside them: packs differ in length from step to step, and what is free in pieces
of other sizes would add up to gigabytes (*not measured here*). The setting is read when a process first allocates on a
GPU, so it is made before torch is imported. Cost: nothing.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names under which torch reads it: of 2.9 and later, and before."""
SETTING = "expandable_segments:True"


def expand_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Ask for segments that grow, unless the user has set the allocator up."""
    if not any(name in environment for name in VARIABLES):
        environment[VARIABLES[0]] = SETTING
