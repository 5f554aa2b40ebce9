"""The loss operator on a GPU: errors against dense float64, time and memory, by torch and by Triton.

At the two sizes of Qwen's vocabulary, the model's (151,936) and the tokenizer's own, which is odd (151,669); and at the
size that Liger's chunked loss was published at (8,192 tokens, width 4,096, vocabulary 128,256 on an H100: 60.7 ms and
11.1 GB). Without a GPU tiny sizes, by torch alone.

Shape letters: S positions, H width, V vocabulary, K entries of the support.
"""

from __future__ import annotations

from typing import Any

from tools.gpu.measuring import device, distance, is_installed, median_seconds, peak_gib, ratio

VOCABULARIES = (151_669, 151_936)
PUBLISHED = (8192, 4096, 128_256, 64)


def _inputs(sizes: tuple[int, int, int, int], dtype: Any, *, frozen: bool = False) -> dict[str, Any]:
    """Return hidden states, a head with 16 rows to spare, labels and a made-up teacher of sizes (S, H, V, K)."""
    import torch

    num_positions, width, vocab, k = sizes
    place, generator = device(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    hidden = torch.randn(num_positions, width, device=place).bfloat16().to(dtype).requires_grad_()
    weight = (torch.randn(vocab + 16, width, device=place) * 2 / width**0.5).bfloat16()
    ids = torch.arange(k) * (vocab // k) + torch.randint(0, vocab // k, (num_positions, k), generator=generator)
    masses = torch.arange(1, k + 1, dtype=torch.float64) ** -1.5
    batch = {
        "support_counts": torch.full((num_positions,), k, dtype=torch.int32),
        "support_ids": ids.reshape(-1),
        "support_logprobs": (0.95 * masses / masses.sum()).log().float().repeat(num_positions),
        "tail_logmass": torch.full((num_positions, 1), 0.05).log(),
        "temperatures": torch.ones(1, dtype=torch.float64),
    }
    return {
        "hidden": hidden,
        "weight": weight.to(dtype).requires_grad_(not frozen),
        "labels": ids[:, 0].to(place),
        "ids": ids.to(place),
        "batch": {name: tensor.to(place) for name, tensor in batch.items()},
        "vocab": vocab,
    }


def _gradients(inputs: dict[str, Any], *, teacher: bool = True, operator: str = "torch") -> list[Any]:
    """Return the fused loss and its gradients."""
    import torch

    from student_train.batch.target_batch import TargetBatch
    from student_train.losses import LossTerm
    from student_train.operator.fused_loss import fused_sparse_loss

    terms = [LossTerm("cross_entropy", 0.1)] + [LossTerm("forward_kl", 0.9)] * teacher
    targets = TargetBatch.from_batch(inputs["batch"]) if teacher else None
    loss = fused_sparse_loss(
        inputs["hidden"],
        inputs["weight"],
        inputs["labels"],
        targets,
        terms,
        len(inputs["labels"]),
        operator=operator,
        vocab_size=inputs["vocab"],
    ).loss
    wanted = [tensor for tensor in (inputs["hidden"], inputs["weight"]) if tensor.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def _dense(inputs: dict[str, Any]) -> list[Any]:
    """Return the same from plain logits and torch's own gradients."""
    import torch

    logits = inputs["hidden"] @ inputs["weight"][: inputs["vocab"]].t()
    log_q = logits.log_softmax(-1)
    members = log_q.gather(1, inputs["ids"])
    log_p = inputs["batch"]["support_logprobs"].view_as(members).to(log_q.dtype)
    log_tail = inputs["batch"]["tail_logmass"].to(log_q.dtype)
    is_member = torch.zeros_like(log_q, dtype=torch.bool).scatter_(1, inputs["ids"], True)
    rest = log_q.masked_fill(is_member, -torch.inf).logsumexp(-1, keepdim=True)
    kl = (log_p.exp() * (log_p - members)).sum(1, keepdim=True) + log_tail.exp() * (log_tail - rest)
    loss = 0.9 * kl.mean() + 0.1 * torch.nn.functional.cross_entropy(logits, inputs["labels"])
    return [loss.detach(), *torch.autograd.grad(loss, [inputs["hidden"], inputs["weight"]])]


def measure(*, dry_run: bool) -> dict[str, Any]:
    """Return errors, milliseconds and GiB."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    operators = ["torch"] + ["triton"] * (device() == "cuda" and is_installed("triton"))
    figures: dict[str, Any] = {} if len(operators) > 1 else {"triton": "skipped: no GPU, or triton is not installed"}
    for vocab in (1013, 1024) if dry_run else VOCABULARIES:
        small = (32, 16, vocab, 8) if dry_run else (256, 1024, vocab, 64)
        exact = _dense(_inputs(small, torch.float64))
        for operator in operators:
            for name in ("float32", "bfloat16"):
                found = _gradients(_inputs(small, getattr(torch, name)), operator=operator)
                figures[f"error_{name}_{operator}_{vocab}"] = distance(found, exact)
        del exact
        large = (64, 16, vocab, 8) if dry_run else (2048, 1024, vocab, 64)
        for operator in operators:
            figures |= _times(large, operator, vocab)
    published = (64, 32, 1024, 8) if dry_run else PUBLISHED
    inputs = _inputs(published, torch.bfloat16)
    for operator in operators:
        named = f"{operator}_{'x'.join(map(str, published[:3]))}"
        milliseconds = 1000 * median_seconds(lambda: _gradients(inputs, operator=operator))  # noqa: B023
        figures[f"milliseconds_{named}"] = milliseconds
        figures[f"peak_gib_{named}"] = peak_gib(lambda: _gradients(inputs, operator=operator))  # noqa: B023
    return figures


def _times(sizes: tuple[int, int, int, int], operator: str, vocab: int) -> dict[str, float]:
    """Return milliseconds with a trained and a frozen head, and what the teacher adds to cross-entropy alone."""
    import torch

    found = {}
    for name, frozen in (("trained", False), ("frozen", True)):
        inputs = _inputs(sizes, torch.bfloat16, frozen=frozen)
        whole = lambda: _gradients(inputs, operator=operator)  # noqa: B023, E731
        found[f"milliseconds_{name}_{operator}_{vocab}"] = 1000 * median_seconds(whole)
        if not frozen:
            alone = lambda: _gradients(inputs, teacher=False, operator=operator)  # noqa: B023, E731
            found[f"kd_over_ce_{operator}_{vocab}"] = ratio(whole, alone)
    return found
