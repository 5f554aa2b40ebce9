"""Keep measured tables in docs/benchmarks.md: each between two markers, replaced as a whole by the command that
measured it.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.atomic import write_atomic

PAGE = Path("docs/benchmarks.md")


def machine() -> str:
    """Describe this machine in a few words: cores, processor family, memory in GiB, GPUs."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{os.cpu_count()} cores ({platform.machine()})", f"{memory_gib:.0f} GiB"]
    if Path("/proc/driver/nvidia").exists():
        import torch

        parts += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(parts)


def measured_by(command: str) -> str:
    """Return the line above a table: the command, today's date and the machine."""
    return f"`{command}`, {datetime.date.today().isoformat()}, {machine()}."


def called(module: str, argv: Sequence[str] | None) -> str:
    """Return the command that ran a module with `argv` (None: this process's), for `measured_by`."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])


def replace_section(name: str, markdown: str, page: Path = PAGE) -> None:
    """Write `markdown` between the markers of section `name`, appending the section where the page has none yet."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8") if page.exists() else "# Benchmarks\n"
    section = f"{begin}\n{markdown.strip()}\n{end}"
    if begin in text and end in text:
        head, rest = text.split(begin, 1)
        text = head + section + rest.split(end, 1)[1]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    write_atomic(page, text.encode(), "benchmarks_page")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table; the first column is text, the others are figures."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
