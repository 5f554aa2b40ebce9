"""What tools/gpu_check.py measures besides memory: the loss operator on a GPU, and the kernels that training relies on.

Each function returns plain figures; `dry_run` runs the same code at tiny sizes on whatever device there is.

Shape letters: S positions, H width, V vocabulary, K entries of the support.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

PAIRS = 7


def _inputs(
    num_positions: int, width: int, vocab: int, k: int, dtype: Any, device: str, *, frozen: bool
) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_positions, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (
        (torch.randn(vocab, width, generator=generator) * 2 / width**0.5).to(device, dtype).requires_grad_(not frozen)
    )
    ids = torch.arange(k) * (vocab // k) + torch.randint(0, vocab // k, (num_positions, k), generator=generator)
    masses = torch.arange(1, k + 1, dtype=torch.float64) ** -1.5
    batch = {
        "support_counts": torch.full((num_positions,), k, dtype=torch.int32),
        "support_ids": ids.reshape(-1),
        "support_logprobs": (0.95 * masses / masses.sum()).log().float().repeat(num_positions),
        "tail_logmass": torch.full((num_positions, 1), 0.05).log(),
        "temperatures": torch.ones(1, dtype=torch.float64),
    }
    on_device = {name: tensor.to(device) for name, tensor in batch.items()}
    return {"hidden": hidden, "weight": weight, "labels": ids[:, 0].to(device), "batch": on_device}


def _loss(inputs: dict[str, Any], *, teacher: bool = True, operator: str = "torch") -> Any:
    from student_train.batch.target_batch import TargetBatch
    from student_train.losses import LossTerm
    from student_train.operator.fused_loss import fused_sparse_loss

    terms = [LossTerm("cross_entropy", 0.1)] + [LossTerm("forward_kl", 0.9)] * teacher
    targets = TargetBatch.from_batch(inputs["batch"]) if teacher else None
    count = len(inputs["labels"])
    return fused_sparse_loss(
        inputs["hidden"], inputs["weight"], inputs["labels"], targets, terms, count, operator=operator
    ).loss


def _gradients(inputs: dict[str, Any], **settings: Any) -> list[Any]:
    import torch

    loss = _loss(inputs, **settings)
    wanted = [tensor for tensor in (inputs["hidden"], inputs["weight"]) if tensor.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def _distance(found: list[Any], expected: list[Any]) -> float:
    """Return the largest error relative to the largest entry of each tensor."""
    pairs = zip(found, expected, strict=True)
    return max(
        float((a.double().cpu() - b.double().cpu()).abs().max() / b.double().cpu().abs().max()) for a, b in pairs
    )


def _seconds(call: Callable[[], object], device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _ratio(first: Callable[[], object], second: Callable[[], object], device: str) -> tuple[float, float]:
    """Return the median of alternating pairs, first over second, and the first's median seconds."""
    for call in (first, second, first, second):
        call()
    ratios, seconds = [], []
    for i in range(PAIRS):
        order = (first, second) if i % 2 == 0 else (second, first)
        measured = {id(call): _seconds(call, device) for call in order}
        ratios.append(measured[id(first)] / measured[id(second)])
        seconds.append(measured[id(first)])
    return statistics.median(ratios), statistics.median(seconds)


def measure_operator(*, dry_run: bool) -> dict[str, Any]:
    """Measure the loss operator: errors against float64 on the CPU, time of distillation over cross-entropy, memory."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    small = (32, 16, 1024, 8) if dry_run else (256, 256, 16_384, 64)
    exact = _gradients(_inputs(*small, torch.float64, "cpu", frozen=False))
    figures: dict[str, Any] = {
        "error_float32": _distance(_gradients(_inputs(*small, torch.float32, device, frozen=False)), exact),
        "error_bfloat16": _distance(_gradients(_inputs(*small, torch.bfloat16, device, frozen=False)), exact),
    }
    size = (64, 16, 2048, 8) if dry_run else (2048, 1024, 151_936, 64)
    for name, frozen in (("trained", False), ("frozen", True)):
        inputs = _inputs(*size, torch.bfloat16, device, frozen=frozen)
        ratio, seconds = _ratio(lambda: _gradients(inputs), lambda: _gradients(inputs, teacher=False), device)  # noqa: B023
        figures |= {f"kd_over_ce_{name}": ratio, f"milliseconds_{name}": 1000 * seconds}
    inputs = _inputs(*size, torch.bfloat16, device, frozen=False)
    if device == "cuda":
        figures |= _loss_memory(inputs)
    figures |= _triton(small, inputs, exact, device)
    return figures


def _loss_memory(inputs: dict[str, Any]) -> dict[str, float]:
    """Return MiB that loss and gradients take: the fused operator's and those of plain logits in float32."""
    import torch

    def plain() -> None:
        logits = inputs["hidden"].float() @ inputs["weight"].float().t()
        log_q = logits.log_softmax(-1)
        members = log_q.gather(1, inputs["batch"]["support_ids"].view(len(logits), -1))
        kd = -members.mean() + torch.log(-torch.expm1(members.logsumexp(-1))).mean()
        loss = 0.9 * kd + 0.1 * torch.nn.functional.cross_entropy(logits, inputs["labels"])
        torch.autograd.grad(loss, [inputs["hidden"], inputs["weight"]])

    peaks = {}
    for name, call in (("fused", lambda: _gradients(inputs)), ("plain", plain)):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {
        "fused_mib": peaks["fused"],
        "plain_mib": peaks["plain"],
        "plain_over_fused_mib": peaks["plain"] / peaks["fused"],
    }


def _triton(small: tuple[int, int, int, int], inputs: dict[str, Any], exact: list[Any], device: str) -> dict[str, Any]:
    import torch

    if device != "cuda" or importlib.util.find_spec("triton") is None:
        return {"triton": "skipped: " + ("no GPU" if device != "cuda" else "triton is not installed")}
    found = _gradients(_inputs(*small, torch.float32, device, frozen=False), operator="triton")
    ratio, _ = _ratio(lambda: _gradients(inputs, operator="triton"), lambda: _gradients(inputs), device)
    return {"triton_error_float32": _distance(found, exact), "triton_over_torch_seconds": ratio}


def measure_kernels(*, dry_run: bool) -> dict[str, Any]:
    """Check wide matrix products, rows that keep to themselves in a pack, 4-bit weights, and liger-kernel's layers."""
    import torch

    from student_train.operator.head_chunks import _has_wide_products
    from student_train.student.row_separation import separate_rows
    from tools.gpu.gpu_memory import qwen3, random_student

    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures: dict[str, Any] = {"bfloat16_products_in_float32": _has_wide_products(device)}
    has_flash = importlib.util.find_spec("flash_attn") is not None and device == "cuda"
    for attention in ("sdpa", "flash_attention_2") if has_flash else ("sdpa",):
        from transformers import AutoModelForCausalLM

        with torch.device(device):
            settings = {"dtype": torch.bfloat16, "attn_implementation": attention, "trust_remote_code": False}
            model = AutoModelForCausalLM.from_config(qwen3("tiny"), **settings)
        separate_rows(model, 1000)  # raises where rows see each other
        figures[f"rows_apart_{attention}"] = model.config._attn_implementation
    if not has_flash:
        figures["rows_apart_flash_attention_2"] = "skipped: flash-attention or a GPU is missing"
    figures["nf4_error"] = _nf4_error(device)
    from shared.recipe.recipe import Student
    from student_train.student.liger import liger_layers

    if device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        figures["liger_error"] = "skipped: liger-kernel or a GPU is missing"
        return figures
    model = random_student(qwen3("tiny"), Student.model_validate({"model": "made-up"}), device).eval()
    probe = torch.arange(64, device=device)[None]
    with torch.no_grad():
        plain = model(input_ids=probe).logits
        with liger_layers(model, wanted=True):
            figures["liger_error"] = _distance([model(input_ids=probe).logits], [plain])
    return figures


def _nf4_error(device: str) -> float | str:
    """Return the error of a product with 4-bit weights against the same weights unpacked."""
    import torch

    if importlib.util.find_spec("bitsandbytes") is None:
        return "skipped: bitsandbytes is not installed"
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(256, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device)
    inputs = torch.randn(8, 256, device=device, requires_grad=True)
    unpacked = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return _distance([layer(inputs).detach()], [(inputs @ unpacked.t()).detach()])
