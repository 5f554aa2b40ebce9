"""Write the demo data: `python -m tools.demo.generate OUTPUT_DIR` makes the eight files, the same text every time.

Train files hold `messages`. Test files, packed by gzip to a seventh, use published shapes: GSM8K's (`question`,
`answer`), HumanEval's (`task_id`, `prompt`, `entry_point`, `canonical_solution`, `test`), `prompt`, `keywords`,
`reference` for log diagnosis and `prompt`, `value`, `others`, `reference` for copying. Cost: under a second.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.demo.domains import DOMAINS, test_examples, train_examples
from tools.demo.example import Example


def _lines(records: list[dict[str, Any]]) -> bytes:
    """One JSON object per line, UTF-8, line feeds only."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def conversations(examples: Iterable[Example]) -> bytes:
    """Contents of a file of prompts with answers, as a recipe's `format: messages` reads them."""
    return _lines([
        {"messages": [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.answer}]}
        for item in examples
    ])  # fmt: skip


def demo_files() -> dict[str, bytes]:
    """File name -> contents of all demo data, unpacked."""
    files = {}
    for domain in DOMAINS:
        files[f"{domain}.train.jsonl"] = conversations(train_examples(domain))
        records = [item.record for item in test_examples(domain)]
        if domain == "code":
            records = [{"task_id": f"Demo/{number}", **record} for number, record in enumerate(records)]
        files[f"{domain}.test.jsonl.gz"] = _lines(records)
    return files


def main() -> None:
    """Write the demo data into OUTPUT_DIR."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output_dir", type=Path)
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name, contents in demo_files().items():
        packed = name.endswith(".gz")
        (folder / name).write_bytes(gzip.compress(contents, mtime=0) if packed else contents)
        print(f"{name}: {len(contents.splitlines())} lines, {len(contents)} bytes")


if __name__ == "__main__":
    main()
