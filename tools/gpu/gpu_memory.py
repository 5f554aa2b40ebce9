"""The plan's memory against what a GPU allocates: students of true size and random weights, trained a few steps.

The trainer, the packs, the loss and the optimizer are those of `decant train`; only weights, rows and targets are made
up. The process is capped to a card's memory. Each student in a process of its own, started by tools/gpu_check.py.
Cost: a build on the device, a cache of a few megabytes, three steps.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tools.gpu.measuring import device, is_installed

CARD_GIB = 24
SIZES: dict[str, tuple[int, int, int, int, bool]] = {
    "tiny": (64, 128, 2, 2, True),
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
}
"""Qwen3: hidden width, width of the MLP, layers, heads, tied."""
_LORA, _QLORA = ({"dtype": "bfloat16", "adapter": kind} for kind in ("lora", "qlora"))
STUDENTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "full": ("0.6B", {"dtype": "float32"}, {"bf16": True}),
    "adam8": ("1.7B", {"dtype": "bfloat16"}, {"optim": "adamw_8bit"}),
    "rounding": ("1.7B", {"dtype": "bfloat16"}, {"optim": "adamw_8bit", "rounding": "stochastic"}),
    "lora": ("4B", _LORA, {"bf16": True}),
    "qlora": ("8B", _QLORA, {"bf16": True}),
    "long": ("0.6B", {"dtype": "float32"}, {"bf16": True, "pack_tokens": 16_384}),
    "paged": ("0.6B", {"dtype": "float32"}, {"bf16": True, "optim": "paged_adamw_8bit"}),
}
"""Name -> size, student section, trainer section."""
TIMED = ("full", "lora", "qlora")
"""Students whose speed is measured, too."""
STEPS, TIMED_STEPS = 3, 8
REFUSED = ("8B", {"dtype": "float32"}, {"bf16": True})
"""A student that no card of 24 GiB trains whole."""


def qwen3(size: str) -> Any:
    """Return the config of a Qwen3 of one of `SIZES`."""
    from transformers import Qwen3Config

    hidden, intermediate, layers, heads, tied = SIZES[size]
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=min(8, heads),
        head_dim=128 if size != "tiny" else 32,
        tie_word_embeddings=tied,
    )


def recipe_of(
    config: Any, directory: Path, student: dict[str, Any], trainer: dict[str, Any], *, tiny: bool, steps: int
) -> Any:
    """Return a recipe of one stage over a made-up cache and a student of a config, both below `directory`."""
    from shared.recipe.recipe import Recipe
    from tools.bench.reader_bench import build

    config.save_pretrained(directory / "student")
    build(directory / "cache", 1 if tiny else 3, 64 if tiny else 512)
    made = {"pack_tokens": 4096, "max_steps": steps, "report_to": "none", "learning_rate": 1e-5, **trainer}
    made |= {"pack_tokens": 192} if tiny else {}
    losses = [{"name": "forward_kl", "weight": 0.9}, {"name": "cross_entropy", "weight": 0.1}]
    document = {
        "name": "gpu-check",
        "cache": str(directory / "cache"),
        "output_dir": str(directory),
        "student": {"model": str(directory / "student"), "gradient_checkpointing": True, **student},
        "stages": [{"name": "kd", "losses": losses, "trainer": made}],
    }
    return Recipe.model_validate(document)


def measure(name: str, *, dry_run: bool) -> dict[str, Any]:
    """Train one of `STUDENTS` a few steps and return planned and allocated bytes, and the speed of `TIMED` ones."""
    size, student, trainer = STUDENTS[name]
    optim = trainer.get("optim", "")
    if ("8bit" in optim or student.get("adapter") == "qlora") and not is_installed("bitsandbytes"):
        return {"skipped": "bitsandbytes is not installed"}
    if "paged" in optim and device() == "cpu":
        return {"skipped": "pages of an optimizer need a GPU"}
    cap_memory()
    steps, size = TIMED_STEPS if name in TIMED and not dry_run else STEPS, "tiny" if dry_run else size
    with tempfile.TemporaryDirectory(prefix="decant-gpu-check-") as directory:
        recipe = recipe_of(qwen3(size), Path(directory), student, trainer, tiny=dry_run, steps=steps)
        figures = {"size": size, "tokens": recipe.stages[0].trainer.pack_tokens}
        trained, found = _train(recipe, qwen3(size))
        figures |= found
        if name in TIMED:
            from tools.gpu.speed import speed

            figures |= speed(trained, recipe)
    return figures


def refused(*, dry_run: bool) -> dict[str, Any]:
    """Return the sentence that a student gets which does not fit, from the check before a stage's first step."""
    from shared.errors import TrainingError
    from student_train.fit.first_step import DeviceMemory, check_first_step
    from student_train.fit.model_shape import shape_of

    del dry_run
    size, student, trainer = REFUSED
    memory = DeviceMemory(CARD_GIB * 2**30, CARD_GIB * 2**30)
    with tempfile.TemporaryDirectory(prefix="decant-gpu-check-") as directory:
        recipe = recipe_of(qwen3(size), Path(directory), student, trainer, tiny=True, steps=1)
    try:
        check_first_step(recipe.stages[0], recipe.student, shape_of(qwen3(size)), memory, _built_under_the_cap)
    except TrainingError as error:
        return {"sentence": str(error)[:160]}
    raise RuntimeError("a whole student of 8 billion float32 weights was said to fit 24 GiB")


def _built_under_the_cap(recomputes: bool) -> int | None:
    """Measure as a first step does: the weights alone are more than the card has."""
    import torch

    del recomputes
    if device() == "cpu":
        return None
    cap_memory()
    try:
        torch.empty(8_190_735_360, dtype=torch.float32, device="cuda")
    except torch.OutOfMemoryError:
        return None
    return int(torch.cuda.max_memory_allocated())


def cap_memory() -> None:
    """Let this process have a card's memory and no more."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_GIB * 2**30 / total))


def _train(recipe: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    """Train the only stage over random weights; return its trainer, and planned and allocated bytes."""
    import torch
    from transformers.trainer_utils import SaveStrategy

    from shared.progress import NOWHERE, Progress
    from student_train.fit.memory import estimate_memory
    from student_train.fit.model_shape import shape_of
    from student_train.stage.stage_run import arguments_of, assemble
    from student_train.stage.stage_work import resolve_stage

    work = resolve_stage(recipe, recipe.stages[0])
    args = arguments_of(work)
    args.save_strategy = SaveStrategy.NO  # nothing of it is worth a disk
    base = random_student(config, work.student, args.device)
    trainer, objective = assemble(work, args, base, Progress("gpu check", work.plan.num_steps, stream=NOWHERE))
    on_gpu = args.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    work.directory.mkdir(parents=True, exist_ok=True)
    trainer.run(None, 0)
    estimate = estimate_memory(shape_of(config), work.student, work.stage.trainer)
    allocated = torch.cuda.max_memory_allocated() if on_gpu else None
    return trainer, {
        "planned_bytes": estimate.allocated,
        "allocated_bytes": allocated,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "planned_over_allocated": None if allocated is None else estimate.allocated / allocated,
        "moment": estimate.moment,
        "operator": objective.operator,
    }


def random_student(config: Any, student: Any, device: Any) -> Any:
    """Return a model with random weights on a device, its linear layers in 4 bits where the adapter is qlora."""
    import torch
    from transformers import AutoModelForCausalLM

    from student_train.student.student import DTYPES

    dtype = DTYPES[student.dtype]
    if not student.adapter.holds_4_bits:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).train()
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, torch.nn.Linear) or layer is head:
                continue
            packed = Linear4bit(1, 1, bias=False, compute_dtype=dtype, quant_type="nf4")
            packed.in_features, packed.out_features = layer.in_features, layer.out_features
            values = torch.randn(layer.weight.shape, dtype=dtype, device=device) * 0.02
            packed.weight = Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=True).to(
                device
            )
            packed.support_avx512bf16_for_cpu = False
            setattr(parent, name, packed)
    for parent in model.modules():
        for name, weight in list(parent.named_parameters(recurse=False)):
            if weight.is_meta:
                values = torch.ones if weight.ndim == 1 else torch.randn
                scale = 1.0 if weight.ndim == 1 else 0.02
                made = values(weight.shape, dtype=dtype, device=device) * scale
                setattr(parent, name, torch.nn.Parameter(made, requires_grad=False))
    model.tie_weights()
    body = getattr(model, model.base_model_prefix)
    body.rotary_emb = type(body.rotary_emb)(config).to(device)
    model.is_loaded_in_4bit = True  # peft asks for it
    return model.train()
