"""Give a loaded model back what its class wrote over while it was loaded.

transformers initialises every module of a model once more and is to leave out what was loaded. Some classes do not:
Youtu's puts zeros in the embedding of the token that fills up, which a tied head shares, and Zaya's -1 in the last
bias of each router. Cost: a few rows of each tensor are read again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def restore_overwritten(model: Any, files: list[Path]) -> list[str]:
    """Load tensors anew of which a part has become one constant, and return their names.

    A tensor that is converted while it is loaded differs in other ways and is left as it is.

    Args:
        model: as loaded from the files, not quantised.
        files: of its weights; pickled ones are passed over.
    """
    from safetensors import safe_open

    own, padding, restored = model.state_dict(), getattr(model.config.get_text_config(), "pad_token_id", None), []
    for path in files if all(file.suffix == ".safetensors" for file in files) else ():
        with safe_open(path, framework="pt") as opened:
            for name in sorted(own.keys() & set(opened.keys())):
                tensor, stored = own[name], opened.get_slice(name)
                if tensor.ndim and tuple(tensor.shape) == tuple(stored.get_shape()) and not tensor.is_meta:
                    rows = _some_rows(tensor, padding)
                    there = torch.stack([stored[row] for row in rows]) if tensor.ndim > 1 else stored[:]
                    here = (tensor[rows] if tensor.ndim > 1 else tensor).to("cpu")
                    if _is_overwritten(here, there.to(here.dtype)):
                        tensor.copy_(opened.get_tensor(name))
                        restored.append(name)
    return restored


def _some_rows(tensor: Tensor, padding: Any) -> list[int]:
    """Return the first, the middle, the last row and that of the padding token, where there are as many."""
    count = tensor.shape[0]
    wanted = {0, count // 2, count - 1, padding if isinstance(padding, int) else 0}
    return sorted(row for row in wanted if 0 <= row < count)


def _is_overwritten(here: Tensor, there: Tensor) -> bool:
    """Tell whether some rows are as stored, and the others all one number that is not stored.

    Example: `[0.5, 0.2, -1]` of the stored `[0.5, 0.2, 0.3]`.
    """
    differs = (here != there).flatten(1).any(1) if here.ndim > 1 else here != there
    others = here[differs].flatten()
    return bool(differs.any()) and not bool(differs.all()) and bool((others == others[0]).all())
