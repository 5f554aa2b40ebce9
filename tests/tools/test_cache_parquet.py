"""Export writes what the reader reads, in Parquet that needs no Decant; import of it gives the same rows bit by bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.cache.cache import Cache, Row
from shared.cache.reading.verify import verify_cache
from shared.errors import CacheError, DamagedError
from tests.shared.altered import edit
from tests.shared.dense_targets import equal_targets
from tests.shared.small_cache import HYBRID, TOP, build, tree
from tools import cli
from tools.cache.parquet_export import export_cache
from tools.cache.parquet_import import import_parquet
from tools.cache.staged_directory import claim, publish

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden" / "format-1" / "cache"


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Iterator[None]:
    """A SIGKILL is no power cut: what was written stays, synchronised or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def cache(no_fsync: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "cache"
    build(path, layers=(TOP, HYBRID))
    return path


@pytest.fixture(scope="module")
def exported(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "hybrid"
    export_cache(cache, out, HYBRID.name)
    return out


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def assert_equal_rows(first: Cache, second: Cache) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert isinstance(a, Row)
        for name in ("key", "row_key", "group_key", "source", "prompt", "response", "reference", "finish_reason"):
            assert getattr(a, name) == getattr(b, name)
        assert np.array_equal(a.token_ids, b.token_ids)
        assert np.array_equal(a.spans, b.spans)
        assert (a.targets is None) == (b.targets is None)
        assert a.targets is None or equal_targets(a.targets, b.targets)


def layers_of(path: Path) -> list[str]:
    return [file.name for file in sorted((path / "targets").iterdir())]


@pytest.mark.parametrize("layer", layers_of(GOLDEN))
def test_golden_cache_comes_back_file_by_file(tmp_path: Path, layer: str) -> None:
    export_cache(GOLDEN, tmp_path / "parquet", layer)
    import_parquet(tmp_path / "parquet", tmp_path / "cache")
    assert_equal_rows(Cache.open(GOLDEN, layer), Cache.open(tmp_path / "cache", verify=True))
    assert list(verify_cache(tmp_path / "cache")) == []
    both = (GOLDEN, tmp_path / "cache")
    files = [sorted((root / "sequences").glob("*.arrow")) for root in both]  # names of parts differ, their bytes do not
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    tables = [
        [pa.ipc.open_file(file).read_all() for file in sorted((root / f"targets/{layer}").glob("*.arrow"))]
        for root in both
    ]
    assert tables[0] == tables[1]  # but for metadata, which says now which layer a part is of
    for name in ("cache.json", f"targets/{layer}/layer.json"):
        texts = [json.loads((root / name).read_text()) for root in both]
        assert texts[0] == {key: value for key, value in texts[1].items() if key != "checksum"}


def test_exported_cache_comes_back_file_by_file(cache: Path, exported: Path, tmp_path: Path) -> None:
    import_parquet(exported, tmp_path / "cache")
    (layer,) = [folder.name for folder in (tmp_path / "cache" / "targets").iterdir()]
    for folder in ("sequences", f"targets/{layer}"):
        parts = [
            [file.read_bytes() for file in sorted((root / folder).glob("*.arrow"))]
            for root in (cache, tmp_path / "cache")
        ]
        assert parts[0] == parts[1]
        assert parts[0]
    for name in ("cache.json", f"targets/{layer}/layer.json"):
        assert (cache / name).read_bytes() == (tmp_path / "cache" / name).read_bytes()


def test_columns_hold_what_the_reader_returns(cache: Path, exported: Path) -> None:
    rows = [row for file in sorted(exported.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    opened = Cache.open(cache, HYBRID.name)
    assert len(rows) == len(opened)
    for got, row in zip(rows, opened, strict=True):
        targets = row.targets
        assert (got["key"], got["prompt"], got["reference"]) == (row.key, row.prompt, row.reference)
        assert got["token_ids"] == row.token_ids.tolist()
        assert list(zip(got["span_starts"], got["span_ends"], strict=True)) == [
            tuple(span) for span in row.spans.tolist()
        ]
        assert [len(head) for head in got["ids"]] == targets.counts.tolist()
        assert list(chain.from_iterable(got["ids"])) == targets.ids.tolist()
        assert np.float32(list(chain.from_iterable(got["logprobs"]))).tolist() == targets.logprobs.tolist()
        assert np.float32(got["label_logprobs"]).tolist() == targets.label_logprobs.tolist()
        assert np.float32(got["tail_logmass_1.0"]).tolist() == targets.tail_logmass[:, 0].tolist()
        assert list(chain.from_iterable(got["draw_ids_1.0"])) == targets.draws[0].ids.tolist()
        assert [sum(times) for times in got["draw_multiplicities_1.0"]] == [HYBRID.draws] * row.num_positions


def test_rows_without_targets_and_repeated_rows_are_exported_once(cache: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(cache, tmp_path / "twice"))
    shutil.rmtree(path / "targets")
    first = sorted((path / "sequences").glob("part-*.json"))[0]
    for file in (first, first.with_suffix(".arrow")):
        shutil.copy(file, file.with_name("part-ffffffff-000000" + file.suffix))
    again = path / "sequences" / "part-ffffffff-000000.json"
    edit(again, lambda record: record.update(stem=again.stem))
    assert len(Cache.open(path)._masks) == 1
    export_cache(path, tmp_path / "parquet")
    result = import_parquet(tmp_path / "parquet", tmp_path / "out")
    assert (result["layer"], result["rows"]) == (None, len(Cache.open(path)))
    assert_equal_rows(Cache.open(path), Cache.open(tmp_path / "out"))


def test_files_of_another_tool_are_imported_with_figures_counted_anew(copy: Path, cache: Path, tmp_path: Path) -> None:
    for file in copy.glob("*.parquet"):
        table = pq.read_table(file).replace_schema_metadata(None)
        wide = table.schema.set(
            table.schema.get_field_index("ids"), pa.field("ids", pa.large_list(pa.large_list(pa.int64())))
        )
        pq.write_table(table.cast(wide).slice(0, 2), file, store_schema=False)
    import_parquet(copy, tmp_path / "out")
    imported = Cache.open(tmp_path / "out", verify=True)
    kept = {row.row_key: row for row in Cache.open(cache, HYBRID.name)}
    assert len(imported) == 6
    assert all(equal_targets(row.targets, kept[row.row_key].targets) for row in imported)
    assert imported.stats()["blob_bytes"] > 0
    assert imported.stats()["mean_support"] == pytest.approx(
        np.concatenate([row.targets.counts for row in imported]).mean()
    )


def change(path: Path, name: str, edit) -> Path:
    """Change one column's values of the first file."""
    file = sorted(path.glob("*.parquet"))[0]
    table = pq.read_table(file)
    at = table.schema.get_field_index(name)
    values = edit(table.column(name).to_pylist())
    field = table.schema.field(at).with_nullable(True)
    pq.write_table(table.set_column(at, field, pa.array(values, type=field.type)), file)
    return file


def first_plus(amount):
    def edit(values):
        values[1][0] = (
            values[1][0] + amount
            if not isinstance(values[1][0], list)
            else [values[1][0][0] + amount, *values[1][0][1:]]
        )
        return values

    return edit


DAMAGES = [
    ("token_ids", first_plus(1), "its tokens or spans do not fit its key"),
    ("span_starts", first_plus(-1), "its tokens or spans do not fit its key"),
    ("ids", first_plus(1000), "lies outside"),
    ("logprobs", first_plus(-3.0), "must sum to 1|not sorted"),
    ("label_logprobs", first_plus(float("nan")), "NaN"),
    ("label_logprobs", lambda values: [values[0], values[1][:-1], *values[2:]], "label_logprobs must be"),
    ("tail_logmass_1.0", lambda values: [values[0], values[1][:-1], *values[2:]], "differ in length"),
    ("draw_multiplicities_1.0", first_plus(1), "do not add up to 4"),
    ("prompt", lambda values: [values[0], None, *values[2:]], "null"),
    ("ids", lambda values: [values[0], None, *values[2:]], "null"),
    ("row_key", lambda values: [values[0], values[0], *values[2:]], "has the row_key of an earlier row"),
    ("source", lambda values: [b"\xff"] * len(values), "cannot be imported"),
]


@pytest.mark.parametrize("column, edit, sentence", DAMAGES)
def test_altered_rows_are_refused_with_file_and_row(
    copy: Path, tmp_path: Path, column: str, edit, sentence: str
) -> None:
    if column == "source":
        file = sorted(copy.glob("*.parquet"))[0]
        file.write_bytes(b"PAR1" + b"\xff" * 100 + b"PAR1")
    else:
        file = change(copy, column, edit)
    with pytest.raises(DamagedError, match=rf"{file.name}.*({sentence})"):
        import_parquet(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_directories_that_are_no_export_are_refused(copy: Path, exported: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="is no finished export; write one with"):
        import_parquet(cache, tmp_path / "out")
    with pytest.raises(CacheError, match="exists and is not an export of this cache"):
        export_cache(cache, cache, TOP.name)
    with pytest.raises(CacheError, match="exists and is not an import of these files"):
        import_parquet(exported, cache)
    file = sorted(copy.glob("*.parquet"))[0]
    pq.write_table(pq.read_table(file).drop_columns(["ids"]), file)
    with pytest.raises(DamagedError, match=f"{file.name} has no column ids"):
        import_parquet(copy, tmp_path / "out")
    file.rename(copy / "mine.parquet")
    with pytest.raises(DamagedError, match=r"mine\.parquet is not named as a part is"):
        import_parquet(copy, tmp_path / "out")
    (copy / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(DamagedError, match=r"tokenizer\.json was altered"):
        import_parquet(copy, tmp_path / "out")


@pytest.mark.parametrize("work, place", [
    ("export", "sequences.before_rename@2"), ("export", "cache_json.after_rename"), ("import",
    "sequences_record.after_rename"),
    ("import", "targets_record.before_rename@2"),
])  # fmt: skip
def test_killed_export_or_import_is_not_there_and_is_continued(
    cache: Path, exported: Path, tmp_path: Path, work: str, place: str
) -> None:
    def run(out: Path) -> None:
        if work == "export":
            export_cache(cache, out, HYBRID.name)
        else:
            import_parquet(exported, out)

    child = os.fork()
    if child == 0:
        os.environ["DECANT_FAILPOINT"] = place
        run(tmp_path / "out")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out")
    run(tmp_path / "whole")
    left = [file for file in (tmp_path / "out").rglob("*") if ".tmp-" in file.name]
    for file in left:
        file.unlink()
    assert len(left) <= 1
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_commands_say_what_they_wrote(cache: Path, tmp_path: Path, capsys) -> None:
    words = [str(tmp_path / "parquet"), "--format", "parquet", "--targets", TOP.name]
    assert cli.main(["cache", "export", str(cache), *words]) == 0
    assert f"9 rows in 3 Parquet files, targets top6-{TOP.hash8}" in capsys.readouterr().out
    assert cli.main(["cache", "import", str(tmp_path / "parquet"), str(tmp_path / "back"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 9
    assert cli.main(["cache", "export", str(cache), str(tmp_path / "other")]) == 2
    assert "name the one to use" in capsys.readouterr().err


def test_published_directory_keeps_nothing_of_killed_commands(tmp_path: Path) -> None:
    staging = tmp_path / ".out.exporting-0"
    (staging / "tokenizer").mkdir(parents=True)
    for name in (".part-0.parquet.tmp-1-abc", "tokenizer/.tokenizer.json.tmp-2-def", "kept.tmp-x", "proof"):
        (staging / name).write_bytes(b"x")
    publish(staging, tmp_path / "out", tmp_path / "out" / "proof")
    assert sorted(file.name for file in (tmp_path / "out").rglob("*") if file.is_file()) == ["kept.tmp-x", "proof"]


def test_export_is_of_the_rows_that_its_id_names_also_while_the_cache_grows(
    cache: Path, tmp_path: Path, monkeypatch
) -> None:
    path = Path(shutil.copytree(cache, tmp_path / "growing"))
    before = Cache.open(path, HYBRID.name)

    def grow_then_claim(directory: Path) -> None:
        build(path, 20, 26, layers=(TOP, HYBRID))
        claim(directory)

    monkeypatch.setattr("tools.cache.staged_directory.claim", grow_then_claim)
    result = export_cache(path, tmp_path / "out", HYBRID.name)
    assert result["rows"] == len(before) < len(Cache.open(path, HYBRID.name))
    assert sum(pq.read_metadata(file).num_rows for file in (tmp_path / "out").glob("*.parquet")) == len(before)


OTHER_KINDS = {
    "key": [["text"], "text", [b"x"]],
    "source": [1, ["text"], {"a": 1}],
    "prompt": [1.5, [["text"]], {"a": 1}],
    "token_ids": [["text"], [0.5], [[1]], 1],
    "ids": [[["text"]], [[0.5]], [1]],
    "logprobs": [[["text"]], [[True]], [1.5]],
    "num_positions": ["9", 0.5, [1]],
}


@pytest.mark.parametrize(("column", "value"), [(c, v) for c, values in OTHER_KINDS.items() for v in values])
def test_columns_of_another_kind_are_refused_by_their_type(tmp_path, column, value):
    build(tmp_path / "cache", layers=(TOP,))
    export_cache(tmp_path / "cache", tmp_path / "out", TOP.name)
    file = sorted((tmp_path / "out").glob("part-*.parquet"))[0]
    table = pq.read_table(file)
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, pa.array([value] * table.num_rows)), file)
    with pytest.raises(DamagedError, match=f"has a column {column} of .*; expected "):
        import_parquet(tmp_path / "out", tmp_path / "again")


def test_texts_of_a_dictionary_in_a_column_of_numbers_are_not_unpacked(tmp_path):
    build(tmp_path / "cache", layers=(TOP,))
    export_cache(tmp_path / "cache", tmp_path / "out", TOP.name)
    file = sorted((tmp_path / "out").glob("part-*.parquet"))[0]
    table = pa.concat_tables([pq.read_table(file).slice(0, 1)] * 2000).combine_chunks()
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["A" * 2**20]))
    lists = pa.ListArray.from_arrays(pa.array(range(2001), pa.int32()), text)
    columns = {name: table.column(name) for name in table.column_names} | {"token_ids": lists}
    pq.write_table(pa.table(columns), file, compression="zstd", store_schema=False)
    before = pa.total_allocated_bytes()
    with pytest.raises(DamagedError, match="has a column token_ids of"):
        import_parquet(tmp_path / "out", tmp_path / "again")
    assert pa.total_allocated_bytes() - before < 2**20
