"""What a stage needs on a training card, by arithmetic: good to 15 %, so leave some room.

Counted: weights, gradients, optimizer state, what autocast casts, activations (kept, or recomputed layer by layer), the loss
operator's chunk and gradient of the head, the attention mask of a pack, and what a CUDA process takes for itself. Logits are never
counted, since they are never held. Cost: the model's shape is read from its config, without weights.

Shape letters: H hidden width, B tokens of a forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shared.recipe import StageTrainer, Student
from student_train.head_chunks import CHUNK_BYTES

GIB = 2**30
PROCESS_BYTES = GIB
"""CUDA context, libraries and fragmentation."""
BYTES_PER_4BIT_WEIGHT = 0.55
"""Half a byte and its share of the quantisation constants."""
LAYER_FACTOR = 1.5
"""Bytes alive in one layer's backward pass over those of its forward pass."""

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a causal language model."""

    num_parameters: int
    num_embedding_parameters: int
    """Embeddings, and the head where it has weights of its own: never quantised, never adapted."""
    num_head_parameters: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    attention_size: int
    """Numbers per token in queries, keys and values together."""
    lora_size: int
    """Sum over the adapted layers of rows + columns: parameters of an adapter per unit of its rank."""


def shape_of(config: Any) -> ModelShape:
    """Return the sizes of the model that a transformers config describes, without allocating it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    own_head = 0 if head.weight is embeddings.weight or text.tie_word_embeddings else head.weight.numel()
    linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    total = sum(parameter.numel() for parameter in model.parameters())
    return ModelShape(
        num_parameters=total,
        num_embedding_parameters=embeddings.weight.numel() + own_head,
        num_head_parameters=head.weight.numel(),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", 4 * text.hidden_size),
        attention_size=head_dim * (text.num_attention_heads + 2 * kv_heads),
        lora_size=sum(layer.in_features + layer.out_features for layer in linear),
    )


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on the card during a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    """The loss operator's chunk, its copy of the head and the head's gradient."""
    process: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.process


def estimate_memory(shape: ModelShape, student: Student, trainer: StageTrainer) -> MemoryEstimate:
    """Return what training a student of a shape needs, in bytes."""
    width = _WIDTH[student.dtype]
    computes_narrow = trainer.bf16 or trainer.fp16 or student.dtype != "float32"
    compute_width = 2 if computes_narrow else 4
    kind = student.adapter.kind
    body = shape.num_parameters - shape.num_embedding_parameters
    weights = body * (BYTES_PER_4BIT_WEIGHT if kind == "qlora" else width) + shape.num_embedding_parameters * width
    if width > compute_width:
        weights += shape.num_parameters * compute_width  # autocast keeps a narrow copy of each weight during the step
    trained = shape.num_parameters if kind == "none" else student.adapter.r * shape.lora_size
    trained_width = width if kind == "none" else 4
    head = CHUNK_BYTES + (shape.num_head_parameters * 4 if kind == "none" else 0)
    head += shape.num_head_parameters * compute_width if width > compute_width else 0
    return MemoryEstimate(
        weights=int(weights),
        gradients=trained * trained_width,
        optimizer=int(trained * _optimizer_bytes(trainer.optim, trained_width)),
        activations=_activation_bytes(shape, student, trainer, width, compute_width),
        head=head,
        process=PROCESS_BYTES,
    )


def _optimizer_bytes(optim: str, trained_width: int) -> float:
    """Return bytes of state per trained parameter, by the optimizer's name in transformers."""
    if "8bit" in optim:
        return 2.0
    if "adafactor" in optim:
        return 0.1
    return {"sgd": 0.0, "adagrad": 1.0 * trained_width, "rmsprop": 1.0 * trained_width}.get(optim, 2.0 * trained_width)


def _activation_bytes(shape: ModelShape, student: Student, trainer: StageTrainer, width: int, compute_width: int) -> int:
    """Return bytes of what the backward pass finds again, for one forward pass."""
    num_tokens = trainer.per_device_train_batch_size * trainer.pack_tokens
    residual = shape.hidden_size * width  # the residual stream keeps the type of the weights under autocast
    layer = 4 * shape.intermediate_size * compute_width + 3 * shape.attention_size * compute_width + 16 * shape.hidden_size
    recomputes = student.gradient_checkpointing or trainer.gradient_checkpointing
    layers_alive = 1 if recomputes else shape.num_layers
    per_token = shape.num_layers * residual + layers_alive * LAYER_FACTOR * layer
    mask = num_tokens**2 if student.attention != "flash_attention_2" else 0
    return int(num_tokens * per_token) + mask
