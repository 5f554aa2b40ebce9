"""Which of a model's files vLLM loads: those that were checked and hashed as the model, and no others.

vLLM reads every *.safetensors of a directory without an index, the index's files where there is one beside
model.safetensors, and `consolidated*.safetensors` alone where there are any; transformers reads model.safetensors
first. Where they differ vLLM gets a directory of links to the files that transformers reads. And vLLM takes a tied
model from its embeddings alone: one that was saved with nothing but its head would answer at random.

A LoRA adapter is folded into the weights: vLLM can apply adapters itself, but its CPU build fails when it scores
prompts with one (rows and adapter indices disagree), and an adapted head could not be trusted to reach scored rows.
Folded weights are also faster to run.
Cost: the headers of the weights; links. For an adapter the model's size in memory and in the temporary directory
(TMPDIR), once per start.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from shared.errors import EngineError, ModelError, reason_of
from shared.models.config_file import read_config
from shared.models.weights.adapters import merge_adapter
from shared.models.weights.loading import load_causal_lm
from shared.models.weights.weight_headers import stored_tensors, weight_files

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_SMALL = (".json", ".jinja", ".txt", ".model", ".py")


def loaded_by_vllm(directory: Path) -> list[Path]:
    """Return the files of weights that vLLM would load of a directory."""
    for pattern in ("consolidated*.safetensors", "*.safetensors", "*.bin"):
        if found := sorted(directory.glob(pattern)):
            return found
    return []


def only_chosen(directory: Path, links: Path) -> Path:
    """Return a directory of which vLLM loads what transformers does: the one given, or `links`, which is filled.

    A directory with model.safetensors and consolidated.safetensors becomes one with links to all but the latter.

    Args:
        directory: of a model.
        links: an empty directory.
    """
    chosen = weight_files(directory)
    is_whole = chosen[0].name in ("model.safetensors", "pytorch_model.bin")
    indices = list(directory.glob("*.index.json")) if is_whole else []
    if set(loaded_by_vllm(directory)) == set(chosen) and not indices:
        return directory
    for path in directory.iterdir():
        if path in chosen or not (path.suffix in _WEIGHTS or path in indices or path.name.startswith("consolidated")):
            (links / path.name).symlink_to(path.resolve())
    return links


def refuse_head_alone(directory: Path) -> None:
    """Refuse a tied model whose one tensor for head and embeddings is stored as the head.

    Raises:
        ModelError: with what to do.
    """
    config = read_config(directory / "config.json")
    text = config.get("text_config")
    ties = [part.get("tie_word_embeddings") for part in (config, text) if isinstance(part, dict)]
    stored = stored_tensors(directory) if any(ties) else {}
    heads = [name for name in stored if f".{name}".endswith(".lm_head.weight")]
    if len(heads) == 1 and [one.shape for one in stored.values()].count(stored[heads[0]].shape) == 1:
        raise ModelError(
            f"{directory} ties head and embeddings and holds only {heads[0]} of them, and vLLM, which reads the "
            "embeddings, would leave them empty; load the model with transformers and save it again, or set "
            "teacher.engine to transformers"
        )


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
            if path.suffix in _SMALL and not copied.exists() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, copied)
    except EngineError:
        raise
    except Exception as error:  # the libraries raise whatever a broken file makes them raise
        reason = reason_of(error)
        raise EngineError(f"{adapter}: cannot be folded into {model_dir} ({type(error).__name__}: {reason})") from error
    return destination
