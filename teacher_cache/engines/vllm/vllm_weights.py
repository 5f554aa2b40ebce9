"""Which of a model's files vLLM loads: those that were checked and hashed as the model, and no others.

vLLM reads every *.safetensors of a directory without an index, the index's files where there is one beside
model.safetensors, and `consolidated*.safetensors` alone where there are any; transformers reads model.safetensors
first. Where they differ vLLM gets a directory of links to the files that transformers reads. And vLLM takes a tied
model from its embeddings alone: one that was saved with nothing but its head would answer at random.
Cost: the headers of the weights; links.
"""

from __future__ import annotations

from pathlib import Path

from shared.errors import ModelError
from shared.models.config_file import read_config
from shared.models.weights.weight_headers import stored_tensors, weight_files

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


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
