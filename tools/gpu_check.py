"""`python -m tools.gpu_check`: what only a GPU can show, measured with one command and written to docs/benchmarks.md.

The loss operator against float64, its time and memory; the plan's memory against what is allocated, capped to 24 GiB;
the kernels that training relies on. Needs no vLLM; what is not installed is skipped by name. Every part is a process
with a time bound of its own, so that one that fails does not cost the others. At most 10 minutes. `--dry-run` runs the
same code at tiny sizes on a CPU and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.bench.benchmarks_page import measured_by, replace_section, table
from tools.own_process import own_command, own_environment

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"operator": 120, "kernels": 60, "full": 90, "adam8": 90, "lora": 100, "qlora": 130}
"""Part -> seconds that it may take."""
COMMAND = "python -m tools.gpu_check"
SECTION = "gpu"


def run_part(name: str, *, dry_run: bool) -> dict[str, Any]:
    """Return the figures of one part, measured in this process."""
    from tools.gpu.gpu_memory import STUDENTS, measure_memory
    from tools.gpu.gpu_parts import measure_kernels, measure_operator

    if name in STUDENTS:
        return measure_memory(name, dry_run=dry_run)
    return (measure_operator if name == "operator" else measure_kernels)(dry_run=dry_run)


def run_apart(name: str, *, dry_run: bool) -> dict[str, Any]:
    """Return the figures of one part, measured in a process of its own, or why there are none."""
    command = own_command("-m", "tools.gpu_check", "--part", name, *(["--dry-run"] if dry_run else []))
    try:
        child = subprocess.run(  # noqa: S603 - our own interpreter
            command, env=own_environment(), capture_output=True, text=True, timeout=PARTS[name], check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"did not finish within {PARTS[name]} s"}
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": f"exit code {child.returncode}: {last[:200]}"}
    figures: dict[str, Any] = json.loads(child.stdout.strip().splitlines()[-1])
    return figures


def as_markdown(results: dict[str, dict[str, Any]]) -> str:
    """Return the section of docs/benchmarks.md."""
    rows = [[f"{part}.{name}", _text(value)] for part, figures in results.items() for name, value in figures.items()]
    note = (
        "full: 0.6B, float32 AdamW; adam8: 1.7B, bfloat16, 8-bit Adam; lora: 4B; qlora: 8B in NF4; 4,096 tokens, "
        "activations "
        "recomputed, capped to 24 GiB. planned_over_allocated: the plan's tensors over torch.cuda.max_memory_allocated."
    )
    return f"## On a GPU\n\n{measured_by(COMMAND)}\n\n{note}\n\n{table(['figure', 'value'], rows)}"


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def main(argv: list[str] | None = None) -> int:
    """Run every part, or one; exit code 1 where there is no GPU or a part failed."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on any device, nothing written")
    parser.add_argument("--part", choices=PARTS, help="one part in this process, its figures as JSON")
    args = parser.parse_args(argv)
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        sentence = (
            "no NVIDIA GPU was found, so nothing was measured; run it on a machine with one, or try its code "
            "with --dry-run"
        )
        print(f"gpu_check: error: {sentence}", file=sys.stderr)
        return 1
    if args.part:
        print(json.dumps(run_part(args.part, dry_run=args.dry_run)))
        return 0
    results = {}
    for name in PARTS:
        results[name] = run_apart(name, dry_run=args.dry_run)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    if not args.dry_run:
        replace_section(SECTION, as_markdown(results), ROOT / "docs/benchmarks.md")
    return 1 if any("failed" in figures for figures in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
