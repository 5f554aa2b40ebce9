"""Train the demo tokenizer, teacher and student: `python -m tools.demo.train_models OUTPUT_DIR`.

Both are Qwen3 models with tied embeddings. The teacher first learns from right answers until it solves the test splits,
then from unsure ones (`tools/demo/example.py`), so that it ends calibrated: mostly right where it is greedy, and wrong
in a sampled answer about as often as they are. The student, more than four times smaller, gets a short start on right
answers only, without diagnoses in the end, so that there is something left to distil. AdamW, linear warm-up, cosine
decay, float32, cross-entropy on the answers and a little on the prompts. Everything is seeded; bitwise equality across
machines is not promised, because kernels differ.
Cost on one free core with AVX2: about 50 and 9 minutes for the teacher's two phases, 5 for the student.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.models.files import load_tokenizer
from shared.models.weights.loading import load_causal_lm
from tools.demo.batches import IGNORED, batches
from tools.demo.scoring import task_scores
from tools.demo.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Phase:
    """Part of a training, with fresh optimizer and learning-rate course; rows are examples per step and domain."""

    steps: int
    rows: dict[str, int]
    unsure: bool = False


@dataclass(frozen=True)
class Plan:
    """Shape of one model and the phases of its training."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    phases: tuple[Phase, ...]
    learning_rate: float
    warmup_steps: int
    seed: int


PROMPT_WEIGHT = 0.2  # of the prompts' own tokens: names repeat there, which teaches copying early
EMBEDDING_STD = 0.08
EMBEDDING_RATE = 0.3  # of the plan's rate
RIGHT = Phase(1800, {"math": 16, "code": 6, "aiops": 8, "copy": 0})
UNSURE = Phase(360, {"math": 12, "code": 6, "aiops": 6, "copy": 4}, unsure=True)
SHORT = Phase(400, {"math": 26, "code": 8, "aiops": 3, "copy": 0})
COPYING = Phase(300, {"math": 6, "code": 3, "aiops": 0, "copy": 12})
PLANS = {
    "teacher": Plan(192, 5, 512, 6, 3, 32, (RIGHT, UNSURE), 1e-3, 40, 11),
    "student": Plan(96, 3, 224, 3, 1, 32, (SHORT, COPYING), 1e-3, 40, 12),
}


def new_model(plan: Plan, tokenizer: Any) -> Any:
    """Build a freshly initialised Qwen3 model in float32 whose end and pad tokens are the tokenizer's."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(plan.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=plan.hidden_size,
        num_hidden_layers=plan.num_layers,
        intermediate_size=plan.intermediate_size,
        num_attention_heads=plan.num_heads,
        num_key_value_heads=plan.num_kv_heads,
        head_dim=plan.head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # the fused kernel's backward pass takes a third of a step at these lengths
    )
    model = Qwen3ForCausalLM(config)
    # Words of one class (service names) start apart and move slowly, or they become one vector before copying them is
    # learned.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_STD)
    return model


def rate(plan: Plan, step: int, steps: int) -> float:
    """Learning rate as a share of the peak: linear warm-up, then a cosine down to 2 % after `steps`."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    progress = (step - plan.warmup_steps) / max(1, steps - plan.warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def summed_losses(model: Any, ids: torch.Tensor, labels: torch.Tensor, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy in nats over the answer tokens and over the prompt tokens of a block [B, T]; no logits at
    pads.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    real, answer = ids[:, 1:] != pad, labels[:, 1:] != IGNORED
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[real]).float(), ids[:, 1:][real], reduction="none")
    return losses[answer[real]].sum(), losses[~answer[real]].sum()


def make_optimizer(model: Any, plan: Plan) -> torch.optim.Optimizer:
    """AdamW with a lower rate for embeddings and weight decay for the matrices of the layers."""
    embeddings = model.model.embed_tokens.weight
    layers = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "layers" in name]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        {"params": layers, "weight_decay": 0.05},
        {"params": [embeddings], "share": EMBEDDING_RATE},
        {"params": norms},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def train(plan: Plan, tokenizer: Any, folder: Path, evaluate_every: int, start: Path | None = None) -> None:
    """Train one model through all phases, or through the last alone from the model in `start`."""
    if start is None:
        model = new_model(plan, tokenizer)
    else:
        model = load_causal_lm(start, what="the model", trust_remote_code=False, dtype=torch.float32).train()
        model.set_attn_implementation("eager")
    print(f"{sum(weight.numel() for weight in model.parameters())} parameters", flush=True)
    for number in range(len(plan.phases)) if start is None else [len(plan.phases) - 1]:
        train_phase(model, plan, number, tokenizer, folder, evaluate_every)


def train_phase(model: Any, plan: Plan, number: int, tokenizer: Any, folder: Path, evaluate_every: int) -> None:
    """Train one phase, print loss, speed and task scores, and save a checkpoint at every evaluation."""
    phase, optimizer = plan.phases[number], make_optimizer(model, plan)
    steps = phase.steps
    begin, num_tokens, loss_sum, num_answers = time.process_time(), 0, 0.0, 0
    fresh = batches(tokenizer, plan.seed + number, phase.rows, phase.unsure)
    for step, blocks in zip(range(1, steps + 1), fresh, strict=False):
        total = sum(int((labels != IGNORED).sum()) for _, labels in blocks)
        for ids, labels in blocks:
            answer, prompt = summed_losses(model, ids, labels, tokenizer.pad_token_id)
            ((answer + PROMPT_WEIGHT * prompt) / total).backward()
            loss_sum, num_tokens = loss_sum + answer.item(), num_tokens + ids.numel()
        num_answers += total
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * rate(plan, step, steps) * group.get("share", 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            speed = num_tokens / (time.process_time() - begin)
            print(
                f"step {step} loss {loss_sum / num_answers:.4f} nats per answer token, {speed:.0f} tokens per CPU "
                "second",
                flush=True,
            )
            loss_sum, num_answers = 0.0, 0
        if step % evaluate_every == 0 or step == steps:
            save(model, tokenizer, folder)
            print(f"step {step} scores {json.dumps(task_scores(model.eval(), tokenizer))}", flush=True)
            model.train()


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model in bfloat16 with its tokenizer and a generation config that ends at the tokenizer's end token."""
    from transformers import GenerationConfig

    written = copy.deepcopy(model).to(torch.bfloat16)
    written.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    written.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Train what `--only` names, or both models, into OUTPUT_DIR/teacher and OUTPUT_DIR/student, and print scores as
    saved.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--only", choices=sorted(PLANS), help="train one model")
    parser.add_argument("--start", type=Path, help="directory of a model that only lacks its last phase")
    parser.add_argument("--tokenizer", type=Path, help="directory of a tokenizer to keep; left out: a new one")
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps between evaluations and checkpoints")
    parser.add_argument("--threads", type=int, default=1, help="more than one only pays on an idle machine")
    arguments = parser.parse_args()
    if arguments.start and not arguments.only:
        parser.error("--start is the start of one model; say which with --only")
    torch.set_num_threads(arguments.threads)
    kept = arguments.tokenizer
    tokenizer = load_tokenizer(kept, trust_remote_code=False) if kept else train_tokenizer()
    for name in [arguments.only] if arguments.only else ["teacher", "student"]:
        folder = arguments.output_dir / name
        train(PLANS[name], tokenizer, folder, arguments.evaluate_every, arguments.start)
        saved = load_causal_lm(folder, what="the model", trust_remote_code=False, dtype=torch.float32).eval()
        print(f"{name}, as saved: {json.dumps(task_scores(saved, tokenizer))}", flush=True)


if __name__ == "__main__":
    main()
