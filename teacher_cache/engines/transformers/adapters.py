"""Fold a LoRA adapter into its model on disk, so that an engine loads plain weights.

vLLM can apply adapters itself, but its CPU build fails when it scores prompts with one (rows and adapter indices
disagree), and an adapted head could not be trusted to reach scored rows. Folded weights are also faster to run.
Cost: the model's size in memory and in the temporary directory (TMPDIR), once per start.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from shared.errors import EngineError

SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py")


def fold_adapter(model_dir: Path, adapter: Path, destination: Path, *, trust_remote_code: bool = False) -> Path:
    """Write the model with its adapter folded in, in the stored dtype, and return `destination`.

    Raises:
        EngineError: model or adapter cannot be loaded, do not fit each other, or cannot be written.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if not (adapter / "adapter_config.json").is_file():
        raise EngineError(f"{adapter}: holds no adapter_config.json; expected a LoRA adapter's directory")
    try:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", trust_remote_code=trust_remote_code)
        if getattr(model, "hf_quantizer", None) is not None:
            raise EngineError(
                f"{model_dir}: quantised weights cannot take the adapter {adapter}; merge it before quantising"
            )
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
        merged.save_pretrained(destination)
        for path in model_dir.iterdir():
            copied = destination / path.name
            if path.suffix in SMALL_SUFFIXES and not copied.exists() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, copied)
    except EngineError:
        raise
    except Exception as error:  # the libraries raise whatever a broken file makes them raise
        reason = " ".join(str(error).split())[:300]
        raise EngineError(f"{adapter}: cannot be folded into {model_dir} ({type(error).__name__}: {reason})") from error
    return destination
