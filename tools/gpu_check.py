"""`python -m tools.gpu_check`: what only a GPU can show, measured with one command of at most 10 minutes.

In this order: the hook in vLLM's V2 runner; the loss operator against float64, its time and memory; attention; rows of
packs at true depth; the plan's memory against what is allocated, capped to 24 GiB, with speed and its share of the
card's peak; training against the CPU's losses, killed and continued; kernels and paged optimizers. Every part is a
process with a time bound of its own, and the section of the page is written anew when it is done, so that one that
fails, or a call that is cut off, costs no other. What is not installed is skipped by name. `--dry-run` runs the same
code at tiny sizes, without a GPU, in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tools.bench.benchmarks_page import measured_by, replace_section, table
from tools.own_process import own_command, own_environment

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "hook": 40,
    "operator": 80,
    "attention": 20,
    "separation": 50,
    "full": 45,
    "adam8": 35,
    "rounding": 35,
    "lora": 45,
    "qlora": 60,
    "long": 30,
    "refused": 25,
    "training": 60,
    "kernels": 20,
    "paged": 30,
}
"""Part -> seconds that it may take, in the order in which they run."""
CALL_SECONDS = 590
"""All of them together; what would not be over by then is not begun."""
INSTALL_SECONDS = 90
COMMAND = "python -m tools.gpu_check"
SECTION = "gpu"
NOTE = (
    "full: 0.6B, float32 AdamW; adam8: 1.7B, bfloat16, 8-bit Adam; rounding: the same, rounded by chance; lora: 4B; "
    "qlora: 8B in NF4; long: a pack of 16,384 tokens, elsewhere 4,096; activations recomputed, capped to 24 GiB. "
    "planned_over_allocated: the plan's tensors over torch.cuda.max_memory_allocated."
)


def run_part(name: str, *, dry_run: bool, vllm_files: Path | None = None) -> dict[str, Any]:
    """Return the figures of one part, measured in this process."""
    from tools.gpu import attention_check, hook_check, kernels_check, operator_check, separation_check, training_check
    from tools.gpu.gpu_memory import STUDENTS, measure, refused

    parts: dict[str, Callable[..., dict[str, Any]]] = {
        "hook": partial(hook_check.measure, files=vllm_files),
        "operator": operator_check.measure,
        "attention": attention_check.measure,
        "separation": separation_check.measure,
        **{student: partial(measure, student) for student in STUDENTS},
        "refused": refused,
        "training": training_check.measure,
        "kernels": kernels_check.measure,
    }
    return parts[name](dry_run=dry_run)


def run_apart(name: str, seconds: float, vllm_files: Path | None = None) -> dict[str, Any]:
    """Return the figures of one part, measured in a process of its own, or why there are none."""
    command = own_command("-m", "tools.gpu_check", "--part", name)
    command += ["--vllm-files", str(vllm_files)] if vllm_files is not None else []
    if seconds < 5:
        return {"failed": "not begun: the call's time was up"}
    try:
        child = subprocess.run(  # noqa: S603 - our own interpreter
            command, env=own_environment(), capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"did not finish within {seconds:.0f} s"}
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": f"exit code {child.returncode}: {last[:200]}"}
    figures: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    return figures


def install(wheels: Path, target: Path) -> None:
    """Install wheels that were brought along beside what is there, for the parts alone.

    Raises:
        RuntimeError: pip cannot.
    """
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        raise RuntimeError(f"{wheels} holds no wheel")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"the wheels of {wheels} cannot be installed: {done.stderr.strip()[-200:]}")
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(target), *([path] if path else [])])
    sys.path.insert(1, str(target))


def as_markdown(results: dict[str, dict[str, Any]]) -> str:
    """Return the section of the page."""
    rows = [[f"{part}.{name}", _text(value)] for part, figures in results.items() for name, value in figures.items()]
    return f"## On a GPU\n\n{measured_by(COMMAND)}\n\n{NOTE}\n\n{table(['figure', 'value'], rows)}"


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).replace("|", "/")
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def run_all(*, dry_run: bool, page: Path | None, vllm_files: Path | None, until: float) -> dict[str, Any]:
    """Run the parts in order and write the page's section after each."""
    results = {}
    for name, bound in PARTS.items():
        left = min(bound, until - time.monotonic())
        if dry_run:
            results[name] = run_part(name, dry_run=True, vllm_files=vllm_files)
        else:
            results[name] = run_apart(name, left, vllm_files)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        if page is not None:
            replace_section(SECTION, as_markdown(results), page)
    return results


def main(argv: list[str] | None = None) -> int:
    """Run every part, or one; exit code 1 where there is no GPU or a part failed."""
    until = time.monotonic() + CALL_SECONDS
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on any device")
    parser.add_argument("--part", choices=PARTS, help="one part in this process, its figures as JSON")
    parser.add_argument(
        "--page", type=Path, help="page whose section is written; docs/benchmarks.md, none for a dry run"
    )
    parser.add_argument("--vllm-files", type=Path, help="folder with vLLM's prompt_logprob.py and logprob.py")
    parser.add_argument("--install-dir", type=Path, help="folder of wheels to install first, for the parts alone")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="decant-gpu-check-") as target:
        if args.install_dir is not None:
            install(args.install_dir, Path(target))
        import torch

        if not args.dry_run and not torch.cuda.is_available():
            sentence = (
                "no NVIDIA GPU was found, so nothing was measured; run it on a machine with one, or try its code "
                "with --dry-run"
            )
            print(f"gpu_check: error: {sentence}", file=sys.stderr)
            return 1
        if args.part:
            print(json.dumps(run_part(args.part, dry_run=args.dry_run, vllm_files=args.vllm_files)))
            return 0
        page = args.page or (None if args.dry_run else ROOT / "docs/benchmarks.md")
        results = run_all(dry_run=args.dry_run, page=page, vllm_files=args.vllm_files, until=until)
    return 1 if any("failed" in figures for figures in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
