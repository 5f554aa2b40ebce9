"""What `cache drop` takes out of a cache, and that it can be killed at any place."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.cache.cache import Cache
from shared.cache.reading.verify import verify_cache
from shared.cache.writing.drop import Drop, carry_out, drop_job, drop_layer, drop_source, dropping
from shared.cache.writing.layer_writer import LayerWriter
from shared.errors import CacheError, DamagedError
from shared.parts.jobs import Job, create_job, list_jobs
from tests.shared.small_cache import HYBRID, SOFTWARE, TOP, build, plan_rows, score, sequence, tree
from tests.shared.test_hidden_layer import add_hidden
from tools import cli


@pytest.fixture
def path() -> Iterator[Path]:
    """Make a cache of two jobs with two targets layers and a hidden one, where an fsync costs nothing."""
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
    build(root / "cache", 0, 10, layers=(TOP, HYBRID))
    build(root / "cache", 10, 17, layers=(TOP, HYBRID))
    add_hidden(root / "cache")
    yield root / "cache"
    shutil.rmtree(root)


def job_of(path: Path, first: int) -> Job:
    return next(job for job in list_jobs(path) if job.request.get("first") == first)


def row_keys(path: Path) -> set[bytes]:
    cache = Cache.open(path, TOP.name)
    return {cache[i].row_key for i in range(len(cache))}


def test_a_job_goes_with_its_targets_and_its_plan_and_the_rest_stays_as_it_was(path: Path) -> None:
    before, job = tree(path), job_of(path, 10)
    left = {name: data for name, data in before.items() if job.id8 not in name}
    kept = {row.row_key for row in plan_rows(0, 10)} & row_keys(path)
    drop = drop_job(path, job.id)
    assert tree(path) == before, "describing it removes nothing"
    assert carry_out(drop) == len(before) - len(left) == len(drop.files()) + len(before) - len(left)
    assert tree(path) == left
    assert row_keys(path) == kept
    assert list(verify_cache(path)) == []
    build(path, 10, 17, layers=(TOP, HYBRID))  # the same recipe builds it again
    assert {**tree(path), **{n: d for n, d in before.items() if n.startswith("hidden")}} == before


def test_a_layer_goes_and_the_rows_stay(path: Path) -> None:
    rows = row_keys(path)
    for name in (HYBRID.name, f"hidden/{next((path / 'hidden').iterdir()).name}"):
        folder = next(iter(path.glob(f"*/{name.split('/')[-1]}*")))
        carry_out(drop_layer(path, name.split("/")[-1]))
        assert not folder.exists()
        assert row_keys(path) == rows
        assert list(verify_cache(path)) == []
    assert Cache.open(path).layer_name == f"{TOP.name}-{TOP.hash8}"  # the only one by now


def test_a_source_goes_where_no_part_holds_another_besides(path: Path) -> None:
    with pytest.raises(CacheError, match=r"part-\w+-000000.arrow holds rows of 'math' and of 'code', .*--job"):
        drop_source(path, "math")
    alone = [row for row in plan_rows(20, 30) if row.source == "code"]
    writer = build(path, layers=())
    job = create_job(path, {"of": "code"}, alone, 4)
    for unit in range(job.num_units):
        writer.write_sequences(job.part_stem(unit), [sequence(row) for row in job.unit(unit)], SOFTWARE)
    with pytest.raises(CacheError, match="holds rows of 'code' and of 'math'"):
        drop_source(path, "code")
    for other in (0, 10):
        carry_out(drop_job(path, job_of(path, other).id8))
    score(LayerWriter.create_or_open(writer, None, TOP, {}))
    assert len(row_keys(path)) == len(alone)
    drop = drop_source(path, "code")
    assert drop.jobs == (job.id8,)
    carry_out(drop)
    assert list(verify_cache(path)) == []
    assert len(Cache.open_sequences(path)) == 0


def killed(drop: Callable[[], Drop], place: str) -> bool:
    """Drop in a fork with a fail-point; tell whether it was killed there."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.environ["DECANT_FAILPOINT"] = place
            carry_out(drop())
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("what", ["job", "layer"])
def test_killed_at_any_place_the_cache_is_whole_and_the_same_command_continues(path: Path, what: str) -> None:
    id_, other = job_of(path, 10).id, path.with_name("other")

    def describe(where: Path) -> Drop:
        return drop_job(where, id_) if what == "job" else drop_layer(where, HYBRID.name)

    whole = path.with_name("whole")
    shutil.copytree(path, whole)
    carry_out(describe(whole))
    steps = ("drop.before_unlink", "drop.before_fsync_dir", "drop.before_rmdir", "dropping.before_rename")
    places, tried = [f"{step}@{n}" for step in steps for n in range(1, 60)], 0
    never: str | None = None
    for place in places:
        if place.split("@")[0] == never:
            continue
        shutil.copytree(path, other)
        if killed(lambda: describe(other), place):
            tried += 1
            assert list(verify_cache(other)) == [], place
            for layer in (TOP.name, HYBRID.name):
                if list((other / "targets").glob(f"{layer}-*/layer.json")):
                    Cache.open(other, layer)
            if what == "job" and tried % 5 == 0:  # a build in between takes up what is left
                again = path.with_name("again")
                shutil.copytree(other, again)
                build(again, 10, 17, layers=(TOP, HYBRID))
                assert list(verify_cache(again)) == [], place
                shutil.rmtree(again)
            continue_drop(lambda: describe(other))
            assert {n: d for n, d in tree(other).items() if ".tmp-" not in n} == tree(whole), place
        else:
            never = place.split("@")[0]  # it is not met so often
        shutil.rmtree(other)
    assert tried > 10


def continue_drop(describe: Callable[[], Drop]) -> None:
    """Give the same command again; where all was done but the last fsync, nothing of that name is there."""
    try:
        carry_out(describe())
    except CacheError as error:
        assert "there are" in str(error)


def test_another_drop_ends_what_an_interrupted_one_began_but_not_what_a_build_took_up(path: Path) -> None:
    gone = job_of(path, 10)
    assert killed(lambda: drop_job(path, gone.id), "drop.before_unlink@2")  # one record of rows is gone
    begun = dropping(path)
    assert len(begun) == gone.num_units
    carry_out(drop_layer(path, HYBRID.name))
    assert not dropping(path)
    removed = [stem for stem in begun if not (path / "sequences" / f"{stem}.json").exists()]
    assert len(removed) == 1
    assert not list(path.rglob(f"{removed[0]}.*"))
    assert list(verify_cache(path)) == []


def test_what_is_not_there_is_refused_with_what_is(path: Path) -> None:
    ids = [job.id8 for job in list_jobs(path)]
    for call, said in (
        (lambda: drop_job(path, "0" * 8), ids[0]),
        (lambda: drop_job(path, ids[0][:4]), "8 digits or more"),
        (lambda: drop_job(path, "../" + ids[0]), ids[1]),
        (lambda: drop_source(path, "maths"), "math"),
        (lambda: drop_layer(path, ".."), TOP.name),
        (lambda: drop_layer(path.parent, TOP.name), "is not a cache"),
    ):
        with pytest.raises(CacheError, match=said):
            call()
    (path / "dropping.json").write_text('{"format": 1, "stems": ["../x"]}')
    with pytest.raises(DamagedError, match=r"dropping\.json does not list parts"):
        drop_layer(path, TOP.name)


def test_the_command_lists_without_yes_and_removes_with_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, id8 = tree(path), job_of(path, 10).id8
    assert cli.main(["cache", "drop", str(path), "--job", id8]) == 0
    said = capsys.readouterr().out
    assert "give --yes to remove them" in said
    assert said.count(".arrow") == len([n for n in before if id8 in n and n.endswith(".arrow")])
    assert tree(path) == before
    assert cli.main(["cache", "drop", str(path), "--job", id8, "--yes"]) == 0
    assert "removed" in capsys.readouterr().out
    assert not [name for name in tree(path) if id8 in name]
    for words in ([], ["--layer", "x", "--job", "y"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["cache", "drop", str(path), *words])
        assert ended.value.code == 2
