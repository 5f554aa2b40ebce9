"""Where a base model comes from and under which licence, as far as its own card, licence file and config say.

Cost: three small files; nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

from shared.text import strict_json

MAX_CARD_BYTES = 2**18


def base_facts(model: str, revision: str | None = None) -> dict[str, str]:
    """Return `licence`, `licence_name`, `licence_link` and `origin` of a base model, as far as its files say them.

    A card that begins with `license: apache-2.0` between two lines `---` gives {"licence": "apache-2.0"}.
    """
    found: dict[str, str] = {}
    first, *lines = _text(model, revision, "README.md").splitlines() or [""]
    ends = (number for number, line in enumerate(lines) if line.startswith("---"))
    head = lines[: next(ends, 0)] if first.rstrip() == "---" else []
    names = {
        "license": "licence",
        "license_name": "licence_name",
        "license_link": "licence_link",
        "base_model": "origin",
    }
    for line in head:
        key, colon, value = line.partition(":")
        if colon and key in names and value.strip():
            found[names[key]] = value.strip().strip("'\"")
    if "licence" not in found and Path(model).is_dir():
        files = sorted(
            path.name for path in Path(model).iterdir() if path.name.upper().startswith(("LICENSE", "LICENCE"))
        )
        found |= {"licence": f"in its file {files[0]}"} if files else {}
    try:
        config = strict_json.loads(_text(model, revision, "config.json") or "{}")
    except ValueError:
        config = {}
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    if "origin" not in found and isinstance(name, str) and name and name != model:
        found["origin"] = name
    return found


def _text(model: str, revision: str | None, name: str) -> str:
    """Return the beginning of a directory's file, or of a hub's that is on this machine; empty without one."""
    path: Path | None = Path(model) / name
    if not Path(model).is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(model, name, revision=revision)
        except HFValidationError:
            cached = None
        path = Path(cached) if isinstance(cached, str) else None
    if path is None or not path.is_file():
        return ""
    with path.open("rb") as stream:
        return stream.read(MAX_CARD_BYTES).decode("utf-8", errors="replace")
