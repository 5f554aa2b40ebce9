"""An adapter from disk, put on a model or merged into it, only where all of it fits.

A merged model is compared with the one under its adapter on a few tokens: where a weight serves two layers and only
one of them is adapted, merging changes both. That of tied embeddings is given to the head as its own first.
Cost: the adapter's size, and two passes of a few tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.errors import ModelError
from shared.models.config_file import MOST_PARTS, read_config
from shared.models.forward.evaluating import evaluating
from shared.models.load_report import LoadMismatch, loading
from shared.models.weights.weight_headers import tensors_of
from shared.special_files import refuse_special_files

ADAPTER = "a directory with adapter_config.json and adapter_model.safetensors"
MERGED = "an adapter that peft can merge into the weights, such as LoRA without biases of its own"
_WITHOUT_IT = "leave the adapter out to take the model without it, or train a LoRA in its place"
FREE_RANK = 256
"""A rank up to here is small, whoever claims it."""
_PROBE_TOKENS = 8
_ROUNDING = {"float32": 1e-2, "float64": 1e-2}
"""Largest distance of merged from adapted logits that counts as rounding, over their spread, by the weights' type."""
_NARROW_ROUNDING = 0.1


def refuse_adapter_inside(directory: str | Path, name: str) -> None:
    """Refuse a model's directory that holds an adapter: transformers would put it on in silence, and vLLM would not.

    Raises:
        ModelError: it holds adapter_config.json.
    """
    path = Path(directory) / "adapter_config.json"
    if path.is_file():
        found = "holds adapter_config.json, so it is an adapter or has one on top; expected a model alone"
        way_out = (
            "merge the adapter into it, or move it to a directory of its own (a teacher's goes under `teacher.adapter`)"
        )
        if "num_virtual_tokens" in read_config(path):
            way_out = f"this one puts learnt vectors before a prompt, which is no part of a model; {_WITHOUT_IT}"
        raise ModelError(f"{name} {found}: {way_out}")


def merge_adapter(model: Any, directory: str | Path) -> Any:
    """Return a model with an adapter merged into its weights.

    Raises:
        ModelError: as `add_saved_adapter`, or it is of a kind that cannot be merged.
    """
    name = f"the adapter '{directory}'"
    wrapped = add_saved_adapter(model, directory)
    with loading(name, MERGED), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what goes wrong with tied weights is mended or refused here
        _untie_adapted(wrapped.get_base_model())
        expected = _probe_logits(wrapped)
        merged = wrapped.merge_and_unload(safe_merge=True)
        is_quantised = getattr(merged, "hf_quantizer", None) is not None
        distance = float((_probe_logits(merged) - expected).abs().mean() / expected.std().clamp_min(1e-30))
    if not is_quantised and not distance <= _ROUNDING.get(str(merged.dtype).rpartition(".")[2], _NARROW_ROUNDING):
        raise ModelError(
            f"{name} says something else merged into {type(merged).__name__} than on top of it (logits of a probe "
            f"differ by {distance:.1%}); expected one whose layers have weights of their own: merge it yourself, and "
            "name the merged model"
        )
    return merged


def _untie_adapted(model: Any) -> None:
    """Give the head a tensor of its own where it shares that of the embeddings and an adapter is on either.

    The adapter adds to what one of them computes; merged into a shared tensor it would change both.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [model.get_output_embeddings(), model.get_input_embeddings()]
    if not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return
    plain = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers]
    weights: list[Any] = [getattr(layer, "weight", None) for layer in plain]
    if weights[0] is None or weights[0] is not weights[1]:
        return
    plain[0].weight = torch.nn.Parameter(weights[0].detach().clone(), requires_grad=False)
    model.all_tied_weights_keys = {}
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _probe_logits(model: Any) -> Any:
    """Return float32 logits [1, _PROBE_TOKENS, V] of a few tokens."""
    import torch

    weight = model.get_input_embeddings().weight
    tokens = torch.arange(1, _PROBE_TOKENS + 1, device=weight.device)[None] * 97 % weight.shape[0]
    with evaluating(model):
        return model(input_ids=tokens, use_cache=False).logits.float()


def add_saved_adapter(model: Any, directory: str | Path) -> Any:
    """Wrap a model with an adapter from disk, all of whose tensors have a layer, and all of whose layers have their
    tensors.

    A model without numbers (of torch's meta device) is wrapped to compare names; None for an adapter of a kind that
    begins with the model's weights, which are compared once they are loaded.

    Raises:
        ModelError: it cannot be loaded, or does not fit the model.
    """
    from peft import PeftConfig, PeftModel

    refuse_special_files(directory)
    name, is_empty = f"the adapter '{directory}'", next(model.parameters()).is_meta
    with loading(name, ADAPTER), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what does not fit is refused below
        if not (Path(directory) / "adapter_config.json").is_file():
            raise FileNotFoundError("no adapter_config.json there")
        _refuse_claims(Path(directory), name)
        config = PeftConfig.from_pretrained(str(directory))
        if config.is_prompt_learning:
            raise ModelError(
                f"{name} is of the kind {config.peft_type.value}, which puts learnt vectors before a prompt and leaves "
                f"the weights as they are; expected one that changes weights, such as LoRA: {_WITHOUT_IT}"
            )
        if is_empty and isinstance(getattr(config, "init_lora_weights", None), str):
            config.init_lora_weights = True  # others begin with a part of the weights, of which there are none
        try:
            wrapped = PeftModel.from_pretrained(model, str(directory), config=config)
            report = wrapped.load_adapter(str(directory), "default")  # again, since only this returns what fitted
        except NotImplementedError:
            if not is_empty:
                raise
            return None
    missing = _without_shared(report.missing_keys, wrapped)
    LoadMismatch(missing=missing, unexpected=report.unexpected_keys).refuse(name, type(model).__name__)
    return wrapped


def _without_shared(missing: Sequence[str], wrapped: Any) -> list[str]:
    """Leave out other names of a tensor that was loaded, as of one vector bank that all layers share."""
    tensors = dict(wrapped.named_parameters(remove_duplicate=False))
    loaded = {id(tensor) for name, tensor in tensors.items() if name not in missing}
    return [name for name in missing if id(tensors.get(name)) not in loaded]


def _refuse_claims(directory: Path, name: str) -> None:
    """Refuse an adapter whose config says a rank that none of its tensors has, or layers without end: peft makes all of
    it before it reads a tensor.

    Raises:
        ModelError: the rank, or the number of layers, is named.
    """
    config = read_config(directory / "adapter_config.json")
    pattern, copies = config.get("rank_pattern"), config.get("layer_replication")
    claimed = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    ranks = sorted(rank for rank in claimed if type(rank) is int and rank > FREE_RANK)
    files = [directory / f"adapter_model{ending}" for ending in (".safetensors", ".bin")]
    stored = [tensor for path in files if ranks and path.is_file() for _, tensor in tensors_of(path)]
    sizes = {size for tensor in stored for size in tensor.shape if size}
    for rank in ranks:
        if not any(size % rank == 0 for size in sizes):  # experts in one tensor have a multiple
            raise ModelError(
                f"{name} says a rank of {str(rank)[:20]} that none of its tensors has; take adapter_config.json and "
                "weights from one copy"
            )
    spans = [span for span in copies if isinstance(span, list)] if isinstance(copies, list) else []
    layers = sum(span[1] - span[0] for span in spans if [type(end) for end in span] == [int, int])
    if layers > MOST_PARTS:
        raise ModelError(f"{name} says {str(layers)[:20]} layers, and a model has at most {MOST_PARTS:,}")
