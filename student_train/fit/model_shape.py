"""Sizes of a causal language model, read from its config: no weight is allocated or downloaded.

Cost: building the model on torch's meta device, which holds no numbers; a second for any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a causal language model."""

    num_parameters: int
    num_embedding_parameters: int
    """Embeddings, and the head where it has weights of its own: never quantised, never adapted."""
    num_head_parameters: int
    num_linear_parameters: int
    """Weights of the linear layers below the head: what autocast copies and what 4 bits hold."""
    largest_linear: int
    """Weights of the largest of them."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    query_size: int
    """Numbers per token in all queries."""
    key_size: int
    """Numbers per token in all keys; values have as many."""
    num_heads: int
    lora_size: int
    """Sum over the adapted layers of rows + columns: parameters of an adapter per unit of its rank."""
    is_tied: bool
    """Embeddings and head are one weight."""
    window: int | None = None
    """Tokens that a layer with a sliding window sees."""
    caps_scores: bool = False
    """Attention has a soft cap or sinks, which torch's kernels do not know."""


def shape_of(config: Any, *, trust_remote_code: bool = False) -> ModelShape:
    """Return the sizes of the model that a transformers config describes, without allocating it."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head.weight is embeddings.weight or bool(text.tie_word_embeddings)
    linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    weights = {id(parameter): parameter.numel() for parameter in model.parameters()}
    total = sum(weights.values())
    if is_tied and head.weight is not embeddings.weight:  # on the meta device ties are not always made
        total -= head.weight.numel()
    return ModelShape(
        num_parameters=total,
        num_embedding_parameters=embeddings.weight.numel() + (0 if is_tied else head.weight.numel()),
        num_head_parameters=head.weight.numel(),
        num_linear_parameters=sum(layer.weight.numel() for layer in linear),
        largest_linear=max((layer.weight.numel() for layer in linear), default=0),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", 4 * text.hidden_size),
        query_size=head_dim * text.num_attention_heads,
        key_size=head_dim * kv_heads,
        num_heads=text.num_attention_heads,
        lora_size=sum(layer.in_features + layer.out_features for layer in linear),
        is_tied=is_tied,
        window=getattr(text, "sliding_window", None),
        caps_scores=bool(getattr(text, "attn_logit_softcapping", None)) or _has_sinks(model),
    )


def _has_sinks(model: Any) -> bool:
    return any(name.endswith(".sinks") for name, _ in model.named_parameters())
