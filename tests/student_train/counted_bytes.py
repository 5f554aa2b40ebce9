"""Bytes of live tensors while code runs, counted storage by storage: what a caching allocator would report, on any
device; and a small student whose steps are counted so.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
VOCAB, ENTRIES, ROW_TOKENS = 4096, 64, 128


class CountedBytes(TorchDispatchMode):
    def __init__(self, model) -> None:
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        for tensor in [*model.parameters(), *model.buffers()]:
            self._add(tensor.data)

    def __enter__(self):
        def resize(storage, size):  # of FSDP, which frees what it gathered so: no operator that could be seen
            torch._C.StorageBase.resize_(storage, size)
            self._set(storage)
            return storage

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error):
        del torch.UntypedStorage.resize_
        return super().__exit__(*error)

    def _add(self, tensor) -> None:
        tensor = getattr(tensor, "_local_tensor", tensor)
        storage = tensor.untyped_storage()
        if storage._cdata in self.sizes:
            return
        weakref.finalize(storage, self._drop, storage._cdata)
        self.sizes[storage._cdata] = 0
        self._set(storage)

    def _set(self, storage) -> None:
        if storage._cdata in self.sizes:
            self.now += storage.nbytes() - self.sizes[storage._cdata]
            self.sizes[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _drop(self, key) -> None:
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(hasattr(kind, "full_tensor") for kind in types):
            return NotImplemented  # shards: what they do to their parts is seen in turn
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result


def small_config():
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )


def small_batch(tokens):
    return {
        "input_ids": torch.randint(VOCAB, (1, tokens)),
        "position_ids": torch.arange(tokens)[None] % ROW_TOKENS,
        "predictor_index": torch.arange(tokens),
        "labels": torch.randint(VOCAB, (tokens,)),
        "support_counts": torch.full((tokens,), ENTRIES, dtype=torch.int32),
        "support_ids": torch.arange(ENTRIES).repeat(tokens),
        "support_logprobs": torch.full((tokens * ENTRIES,), -5.0),
        "tail_logmass": torch.full((tokens, 1), 0.2).log(),
        "temperatures": torch.ones(1, dtype=torch.float64),
    }


def counted_step(student, trainer, *, spread=lambda model, base: model, layers=None, terms=(), hidden_batch=None):
    """Return the most bytes alive during a second step of a small Qwen3, and its shape.

    `spread` gives the model to several processes; `layers` gives the base its losses on a hidden layer, whose `terms`
    read `hidden_batch`.
    """
    from transformers import AutoModelForCausalLM

    from student_train.fit.model_shape import shape_of
    from student_train.losses import LossTerm
    from student_train.student.forward_patch import Objective, patch_forward
    from student_train.student.row_attention import NAME, switch_attention
    from student_train.student.student import DTYPES, add_adapter
    from student_train.student.student_head import head_of

    config = small_config()
    base = AutoModelForCausalLM.from_config(config, dtype=DTYPES[student.dtype]).train()
    switch_attention(base, NAME)
    objective = Objective(
        head_of(base, VOCAB), terms=[LossTerm("forward_kl"), LossTerm("cross_entropy"), *terms], chunk_bytes=MIB
    )
    model = add_adapter(base, student.adapter)
    if trainer.gradient_checkpointing:
        if model is not base:
            base.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective.layers = layers(base) if layers else None
    patch_forward(base, objective)
    model = spread(model, base)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], foreach=True)
    batch = small_batch(trainer.pack_tokens) | (hidden_batch or {})
    with CountedBytes(model) as counted:
        for _ in range(2):
            counted.peak = counted.now
            for _ in range(trainer.gradient_accumulation_steps):
                with torch.autocast("cpu", torch.bfloat16, enabled=trainer.bf16):
                    output = model(**batch, num_items_in_batch=trainer.pack_tokens)
                output.loss.backward()
                del output
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return counted.peak, shape_of(config)
