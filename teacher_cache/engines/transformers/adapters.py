"""Fold a LoRA adapter into its model on disk, so that an engine loads plain weights.

vLLM can apply adapters itself, but its CPU build fails when it scores prompts with one (rows and adapter indices
disagree), and an adapted head could not be trusted to reach scored rows. Folded weights are also faster to run.
Cost: the model's size in memory and in the temporary directory (TMPDIR), once per start.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from shared.errors import EngineError, reason_of
from shared.models.weights.adapters import merge_adapter
from shared.models.weights.loading import load_causal_lm

SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py")


def fold_adapter(model_dir: Path, adapter: Path, destination: Path, *, trust_remote_code: bool = False) -> Path:
    """Write the model with its adapter folded in, in the stored dtype, and return `destination`.

    Raises:
        EngineError: model or adapter cannot be loaded, do not fit each other, or cannot be written.
    """
    try:
        model = load_causal_lm(model_dir, what="the teacher", trust_remote_code=trust_remote_code, dtype="auto")
        if getattr(model, "hf_quantizer", None) is not None:
            raise EngineError(
                f"{model_dir}: quantised weights cannot take the adapter {adapter}; merge it before quantising"
            )
        merge_adapter(model, adapter).save_pretrained(destination)
        for path in model_dir.iterdir():
            copied = destination / path.name
            if path.suffix in SMALL_SUFFIXES and not copied.exists() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, copied)
    except EngineError:
        raise
    except Exception as error:  # the libraries raise whatever a broken file makes them raise
        reason = reason_of(error)
        raise EngineError(f"{adapter}: cannot be folded into {model_dir} ({type(error).__name__}: {reason})") from error
    return destination
