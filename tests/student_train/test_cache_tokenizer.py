"""A cache's tokenizer runs no code of its own, and one that is not as it was written is found before the first step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import xxhash

from shared.errors import DamagedError
from student_train.stage.stages import run_stages

RUNS = "import pathlib\npathlib.Path({!r}).touch()\n"


def planted(cache: Path, files: dict[str, bytes], *, listed: bool) -> None:
    """Put files into a cache's tokenizer, and into what cache.json says of it."""
    header = json.loads((cache / "cache.json").read_text())
    header.pop("checksum", None)  # as a cache of an earlier version, or an attacker, has it
    for name, data in files.items():
        (cache / "tokenizer" / name).write_bytes(data)
        header["tokenizer_files"][name] = {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}
    if listed:
        (cache / "cache.json").write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("says", "listed", "message"),
    [
        ({"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}, True, r"holds own\.py, .*; build the cache anew"),
        (
            {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}},
            False,
            r"tokenizer_config\.json has \d+ bytes where at most",
        ),
        ({"auto_map": {"AutoTokenizer": ["a/b--own.Own", None]}}, True, r"names Python to run \(`auto_map`\)"),
    ],
    ids=["with its code", "unlisted", "from a hub"],
)
def test_code_of_a_tokenizer_is_refused_before_the_first_step(recipe_of, tiny, tmp_path, says, listed, message):
    shutil.copytree(tiny.cache, tmp_path / "cache")
    config = {**json.loads((tiny.cache / "tokenizer/tokenizer_config.json").read_text()), **says}
    files = {"tokenizer_config.json": json.dumps(config | {"tokenizer_class": "Own"}).encode()}
    if "names" not in message:
        files["own.py"] = RUNS.format(str(tmp_path / "ran")).encode()
    planted(tmp_path / "cache", files, listed=listed)
    with pytest.raises(DamagedError, match=message):
        run_stages(recipe_of(cache=[tmp_path / "cache"]))
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "run/train/kd").glob("metrics*"))
