"""Training from a URL: the windows that this machine keeps, or a refusal before any work."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest

from shared.cache.sync.listing import listing_of
from shared.cache.sync.push import push_cache
from shared.errors import TrainingError
from shared.places import store_dir
from shared.recipe.file import dump_recipe
from shared.recipe.recipe import Recipe
from shared.remote.transfer import Remote
from student_train.stage.stage_order import open_caches
from student_train.stage.stages import run_stages
from tests.remote.loopback import WebServer, needs_s3_server
from tests.student_train.tiny_caches import make_cache
from tests.tiny_models import make_qwen3
from tools import cli
from tools.bench.loopback_s3 import serving, slow_s3
from tools.bench.trials import remote_kill_trials

NUM_PARTS = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A student, and a cache of 24 parts on a directory."""
    root = tmp_path_factory.mktemp("streamed")
    teacher = make_qwen3(root / "teacher", seed=1)
    cache = make_cache(root / "cache", teacher, num_rows=5 * NUM_PARTS, num_parts=NUM_PARTS)
    return SimpleNamespace(cache=cache, student=make_qwen3(root / "student", seed=2, spread=0.05))


@pytest.fixture
def served(new_store, trained, tmp_path):
    """A web server that holds that cache."""
    shutil.copytree(trained.cache, tmp_path / "served")
    names = [str(file.relative_to(trained.cache)) for file in trained.cache.rglob("*") if file.is_file()]
    (tmp_path / "served" / "files.json").write_bytes(listing_of(trained.cache, names))
    with serving(WebServer(tmp_path / "served")) as server:
        yield server


def recipe_of(trained, cache, output_dir, trainer=None, **stage):
    settings = {"learning_rate": 3e-3, "max_steps": 12, "pack_tokens": 192, "save_steps": 3, "report_to": "none"}
    return Recipe.model_validate(
        {
            "name": "streamed",
            "output_dir": str(output_dir),
            "cache": str(cache),
            "student": {"model": str(trained.student)},
            "stages": [
                {"name": "kd", "losses": [{"name": "forward_kl"}], "trainer": settings | (trainer or {}), **stage}
            ],
        }
    )


def sizes(trained):
    """Bytes of each part, rows and targets, largest first."""
    rows = sorted((trained.cache / "sequences").glob("*.arrow"))
    targets = sorted((trained.cache / "targets").glob("*/*.arrow"))
    return sorted((a.stat().st_size + b.stat().st_size for a, b in zip(rows, targets, strict=True)), reverse=True)


GROWING = {"math": {"kind": "linear", "start": 0.2, "end": 0.8}, "ops": 0.5}


@pytest.mark.parametrize(
    ("stage", "parts"), [({}, 8), ({"window_parts": 5}, 5), ({"window_parts": 3, "mixture": GROWING}, 6)]
)
def test_windows_that_this_machine_does_not_keep_are_refused_before_work_with_what_helps(
    served, trained, tmp_path, monkeypatch, capsys, stage, parts
):
    needed = sum(sizes(trained)[:parts])
    monkeypatch.setenv("DECANT_STORE_GB", str((needed - 1) / 1e9))
    recipe = recipe_of(trained, served.url, tmp_path / "run", **stage)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert cli.main(["plan", str(tmp_path / "recipe.yaml")]) == 2
    said = capsys.readouterr().err
    assert (
        f"of {served.url}, up to {needed:,} bytes, where DECANT_STORE_GB lets this machine keep {needed - 1:,}" in said
    )
    assert "recipe.yaml:" in said
    assert not [name for name in served.requests if name.endswith(".arrow")]
    assert not (tmp_path / "run").exists()
    fewer = int(said.split("set window_parts to ")[1].split(",")[0])
    open_caches(recipe, recipe.stages[0].model_copy(update={"window_parts": fewer}))
    with pytest.raises(TrainingError, match="set window_parts"):
        open_caches(recipe, recipe.stages[0].model_copy(update={"window_parts": fewer + 1}))
    monkeypatch.setenv("DECANT_STORE_GB", said.split("raise DECANT_STORE_GB to ")[1].split()[0])
    open_caches(recipe, recipe.stages[0])


def test_a_directory_is_not_bounded_by_the_store(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE_GB", "0.000001")
    recipe = recipe_of(trained, trained.cache, tmp_path / "run", window_parts=8)
    assert len(open_caches(recipe, recipe.stages[0])) == 5 * NUM_PARTS


def kept() -> dict[str, int]:
    """Return bytes of each file that the store keeps parts in."""
    found = {}
    for file in (store_dir() / "parts").glob("*"):
        with suppress(FileNotFoundError):  # renamed or removed since
            found[file.name] = file.stat().st_size
    return found


@contextmanager
def most_kept():
    """Yield a list whose last entry is the most bytes that the store's parts had together, looked at all the time.

    Files are looked at one after another, so what two looks in a row do not see alike counts for nothing.
    """
    most, over = [0], threading.Event()

    def look() -> None:
        before = kept()
        while not over.wait(0.002):
            now = kept()
            if now == before:
                most.append(max(most[-1], sum(now.values())))
            before = now

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_a_slow_s3_that_breaks_off_trains_as_the_directory_does_within_the_bound(
    new_store, trained, tmp_path, monkeypatch
):
    needs_s3_server()
    steps = {"max_steps": 36}
    run_stages(recipe_of(trained, trained.cache, tmp_path / "here", steps, window_parts=4))
    bound = sum(sizes(trained)[:4])  # the least that is not refused
    with slow_s3("bucket") as proxy:
        push_cache(trained.cache, Remote("s3://bucket/demo"))
        monkeypatch.setenv("DECANT_STORE_GB", str(bound / 1e9))
        proxy.requests.clear()
        with most_kept() as most:
            run_stages(recipe_of(trained, "s3://bucket/demo", tmp_path / "there", steps, window_parts=4))
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "there/train/kd" / name).read_bytes() == (tmp_path / "here/train/kd" / name).read_bytes()
    assert proxy.broken
    assert 0 < most[-1] <= bound
    fetched = Counter(one for one in proxy.requests if one.startswith("GET") and "/targets/" in one and "arrow" in one)
    assert len(fetched) == NUM_PARTS


@pytest.mark.slow
def test_killed_readers_pushes_and_pulls_leave_nothing_half_and_go_on(capsys):
    needs_s3_server()
    assert remote_kill_trials.main(["--kills", "3", "--no-page"]) == 0
    said = capsys.readouterr().out
    assert "| all | 9 | " in said
