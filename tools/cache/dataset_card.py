"""README.md of a cache at a URL: what it is, from which teacher, under which licence, and how to train from it.

Only what the cache itself says is written; what it does not say is named as unknown. The head is YAML, as hubs read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def dataset_card(cache: Mapping[str, Any], url: str) -> str:
    """Return the card of a cache that will be at a URL; `cache` is what `decant cache ls --json` says."""
    identity, rows = cache["identity"], cache["rows"]
    licence = str(identity.get("licence") or "unknown")
    category = next((name for most, name in _SIZES if rows < most), "n>10M")
    head = {"license": licence.lower(), "tags": ["decant", "distillation"], "size_categories": [category]}
    size = cache["bytes"] + cache["layers_bytes"]
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in head.items()), "---", ""]
    lines += ["# A cache of a teacher's answers and distributions", ""]
    lines += [f"{rows:,} rows, {cache['positions']:,} supervised positions, {size:,} bytes.", ""]
    lines += ["| | |", "|---|---|"]
    tokenizer = f"{identity.get('tokenizer') or 'unnamed'}, {identity['vocab_size']:,} entries"
    facts = {
        "licence": licence,
        "answers": identity.get("answers") or "unknown",
        "tokenizer": f"{tokenizer}, hash {identity['tokenizer_hash']}",
    }
    lines += [f"| {name} | {plain(value)} |" for name, value in facts.items()]
    lines += [f"| source {plain(name)} | {count:,} rows |" for name, count in cache["sources"].items()]
    for name, layer in (*cache["layers"].items(), *cache["hidden"].items()):
        said = layer["identity"]
        captured = ", ".join(
            f"{key} {said[key]}" for key in ("mode", "k", "draws", "mass", "temperatures", "tail") if key in said
        )
        lines.append(
            f"| layer {plain(name)} | teacher {plain(said['teacher'])}, {plain(said['dtype'])}, "
            f"{plain(captured or 'hidden states')}; {layer['rows']:,} rows, {layer['bytes']:,} bytes |"
        )
    lines += ["", "Train from it with Decant, which fetches parts as they are"]
    lines += ["read and checks them against their records:", "", "```yaml", f"cache: {url}", "```", ""]
    lines += ["or bring all of it with `decant cache pull " + url + " DIRECTORY`.", ""]
    return "\n".join(lines)


def plain(text: str) -> str:
    """Return text that stays within its line, cell and code span, whatever it holds, and makes no link or image.

    >>> plain("a|b <img> ![x](https://host)")
    'a/b &lt;img> ! [x] (https://host)'
    """
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return printable.replace("|", "/").replace("`", "'").replace("<", "&lt;").replace("](", "] (").replace("![", "! [")
