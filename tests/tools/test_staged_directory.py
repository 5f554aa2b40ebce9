"""Two processes of one command: one writes, the other is told so, and neither spoils what the other makes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.errors import CacheError
from tests.shared.small_cache import HYBRID, TOP, build, tree
from tools import cli
from tools.cache.staged_directory import claim, publish, staging_path

ROOT = Path(__file__).parents[2]
WORDS = {
    "merge": ("merge", "out", "a", "b", "--copy"),
    "subset": ("subset", "a", "out", "--count", "7"),
    "export": ("export", "a", "out", "--targets", TOP.name),
    "import": ("import", "exported", "out"),
}
HOLD = """
import sys, time
from pathlib import Path
from tools.cache.staged_directory import claim
claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    build(tmp_path / "a", 0, 20, 4, (TOP, HYBRID))
    build(tmp_path / "b", 10, 30, 4, (TOP, HYBRID))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["cache", "export", "a", "exported", "--targets", TOP.name]) == 0
    return tmp_path


def held(staging: Path) -> subprocess.Popen[str]:
    """Start a process that writes a directory."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(staging)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


@pytest.mark.parametrize("command", list(WORDS))
def test_a_place_that_is_a_link_is_written_where_the_link_leads(place, command, capsys):
    assert cli.main(["cache", *WORDS[command]]) == 0
    expected = tree(place / "out")
    for leads_to in ("there", "disk/new"):
        shutil.rmtree((place / "out").resolve())
        (place / "there").mkdir(exist_ok=True)
        (place / "disk").mkdir(exist_ok=True)
        (place / "out").unlink(missing_ok=True)
        (place / "out").symlink_to(leads_to)
        assert cli.main(["cache", *WORDS[command]]) == 0
        assert (place / "out").is_symlink()
        assert tree(place / leads_to) == expected
        assert cli.main(["cache", *WORDS[command]]) == 0
    assert [path.name for path in place.rglob(".*")] == []


@pytest.mark.parametrize("command", list(WORDS))
def test_links_in_a_circle_are_one_sentence(place, command, capsys):
    (place / "out").symlink_to("out")
    assert cli.main(["cache", *WORDS[command]]) == 2
    said = capsys.readouterr().err
    assert said.endswith("out is a link in a circle of links; remove it, or name a directory that does not exist\n")
    assert [path.name for path in place.rglob(".*")] == []


@pytest.mark.parametrize("command", list(WORDS))
def test_a_command_that_another_process_is_at_is_refused_until_that_ends(place, command, capsys):
    assert cli.main(["cache", *WORDS[command]]) == 0
    expected = tree(place / "out")
    (proof,) = {"jobs", "decant-export.json"} & {path.name for path in (place / "out").iterdir()}
    ids = [path.name for path in (place / "out" / "jobs").iterdir()] if proof == "jobs" else []
    doing = {"merge": "merging", "subset": "choosing", "export": "exporting", "import": "importing"}[command]
    (place / "out").rename(place / "kept")
    staging = staging_path(place / "out", doing, ids[0]) if ids else _staging_of_export(place)
    holder = held(staging)
    try:
        capsys.readouterr()
        assert cli.main(["cache", *WORDS[command]]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"decant: error: {staging} is written by another process that does the same")
        assert not list(staging.iterdir()) and not (place / "out").exists()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert cli.main(["cache", *WORDS[command]]) == 0
    assert set(tree(place / "out")) == set(expected)
    assert not list(place.glob(".out*"))


@pytest.mark.parametrize("command", ["merge", "subset", "export"])
def test_a_damaged_tokenizer_is_refused_before_anything_is_written(place, command, capsys):
    (place / "a" / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    before = set(place.iterdir())
    assert cli.main(["cache", *WORDS[command]]) == 1
    assert "tokenizer.json was altered after it was written" in capsys.readouterr().err
    assert set(place.iterdir()) == before


def _staging_of_export(place: Path) -> Path:
    from shared.cache.cache import Cache

    return staging_path(place / "out", "exporting", Cache.open(place / "a", TOP.name).cache_id)


def test_a_directory_stays_this_processs_own_until_it_is_published(tmp_path):
    staging, out = tmp_path / ".out.x-1", tmp_path / "out"
    claim(staging)
    claim(staging)  # of a command that failed here before
    (staging / "file").write_text("a")
    publish(staging, out, out / "file")
    claim(staging)  # anew, of another run
    staging.rmdir()
    claim(staging)
    started = time.monotonic()
    holder = held(tmp_path / "other")
    with pytest.raises(CacheError, match="run this command again"):
        claim(tmp_path / "other")
    holder.kill()
    holder.wait()
    claim(tmp_path / "other")
    assert time.monotonic() - started < 60
