"""The kernels that training relies on: wide matrix products, 4-bit weights, flash-attention's packs, liger's layers."""

from __future__ import annotations

from typing import Any

from tools.gpu.measuring import device, distance, is_installed


def measure(*, dry_run: bool) -> dict[str, Any]:
    """Return what works and how far it is off."""
    from student_train.operator.head_chunks import _has_wide_products

    del dry_run
    figures: dict[str, Any] = {"bfloat16_products_in_float32": _has_wide_products(device())}
    figures["rows_apart_flash_attention_2"] = _flash_attention()
    figures["nf4_error"] = _nf4_error()
    figures["liger_error"] = _liger_error()
    return figures


def _flash_attention() -> str:
    if device() != "cuda" or not is_installed("flash_attn"):
        return "skipped: flash-attention or a GPU is missing"
    import torch
    from transformers import AutoModelForCausalLM

    from student_train.student.row_separation import separate_rows
    from tools.gpu.gpu_memory import qwen3

    settings = {"dtype": torch.bfloat16, "attn_implementation": "flash_attention_2", "trust_remote_code": False}
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(qwen3("tiny"), **settings)
    return separate_rows(model, 1000)  # raises where rows see each other


def _liger_error() -> float | str:
    """Return the error of logits by liger-kernel's layers against transformers' own."""
    if device() != "cuda" or not is_installed("liger_kernel"):
        return "skipped: liger-kernel or a GPU is missing"
    import torch

    from shared.recipe.recipe import Student
    from student_train.student.liger import liger_layers
    from tools.gpu.gpu_memory import qwen3, random_student

    model = random_student(qwen3("tiny"), Student.model_validate({"model": "made-up"}), device()).eval()
    probe = torch.arange(64, device=device())[None]
    with torch.no_grad():
        plain = model(input_ids=probe).logits
        with liger_layers(model, wanted=True):
            return distance([model(input_ids=probe).logits], [plain])


def _nf4_error() -> float | str:
    """Return the error of a product with 4-bit weights against the same weights unpacked."""
    if not is_installed("bitsandbytes"):
        return "skipped: bitsandbytes is not installed"
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(256, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device())
    inputs = torch.randn(8, 256, device=device(), requires_grad=True)
    unpacked = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return distance([layer(inputs).detach()], [(inputs @ unpacked.t()).detach()])
