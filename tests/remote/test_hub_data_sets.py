"""Data sets of a hub: the rows that `datasets` reads, from the same files, within the bounds that local files have."""

from __future__ import annotations

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.files.prompt_files import content_hash
from teacher_cache.prompts.problems import Problems
from teacher_cache.prompts.prompts import read_prompts
from tests.remote.fake_hub import REVISION

NAME = "org/stories"


@pytest.fixture
def files(hub, tmp_path, monkeypatch):
    """The files of a data set on a hub, to fill."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.address)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return hub.repositories.setdefault(f"datasets/{NAME}", {})


def parquet(*texts: str) -> bytes:
    return table(pa.table({"text": texts}))


def table(rows: pa.Table) -> bytes:
    data = io.BytesIO()
    pq.write_table(rows, data, compression="zstd")
    return data.getvalue()


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def card(*configs: dict) -> bytes:
    return f"---\nlicense: mit\nconfigs: {json.dumps(configs)}\n---\nStories.\n".encode()


def read(**settings) -> list:
    return list(read_prompts([PromptSource(source="s", path=NAME, format="text", **settings)], Problems()))


SPLITS = {f"data/{split}-0000{i}-of-00002": f"{split} {i}" for split in ("train", "test") for i in (0, 1)}
OF_CARD = {
    "README.md": card(
        {"config_name": "main", "data_files": [{"split": "train", "path": "a/*.jsonl"}]},
        {
            "config_name": "short",
            "data_files": [{"split": "train", "path": "b/1.jsonl"}, {"split": "own", "path": "c*"}],
        },
    ),
    **{name: lines(name, "more") for name in ("a/1.jsonl", "a/2.jsonl", "b/1.jsonl", "c.jsonl", "d.jsonl")},
}


@pytest.mark.parametrize(
    ("content", "settings"),
    [
        ({f"{name}.parquet": parquet(text, text) for name, text in SPLITS.items()}, {}),
        ({f"{name}.parquet": parquet(text, text) for name, text in SPLITS.items()}, {"split": "test"}),
        ({f"{name}.parquet": parquet(text, text) for name, text in SPLITS.items()}, {"split": "train+test"}),
        ({f"{name}.parquet": parquet(text, text) for name, text in SPLITS.items()}, {"split": "all"}),
        ({f"{name}.jsonl.gz": gzip.compress(lines(text, "ü")) for name, text in SPLITS.items()}, {"split": "test"}),
        (OF_CARD, {"config": "main"}),
        (OF_CARD, {"config": "short", "split": "own"}),
        ({"train.csv": b'text,id\n"a, b",1\nc,2\n'}, {}),
        ({"train.tsv": b"text\tid\na, b\t1\nc\t2\n"}, {}),
        ({"README.md": card({"config_name": "x", "data_files": "*.csv", "sep": "|"}), "1.csv": b"id|text\n1|a,\n"}, {}),
        ({"train.txt": "one line\nanother, ü\r\n{ that".encode()}, {}),
        ({"train.json": json.dumps([{"text": "a"}, {"text": "b"}]).encode()}, {}),
    ],
)  # fmt: skip
def test_rows_are_those_that_datasets_streams(files, content, settings):
    import datasets

    files.update(content)
    asked = {"name": settings["config"]} if "config" in settings else {}
    split = settings.get("split", "train")
    expected = datasets.load_dataset(NAME, split=split, streaming=True, revision=REVISION, **asked)
    found = read(**settings)
    assert [row.text for row in found] == [row["text"] for row in expected]
    assert {row.path.removeprefix(f"{NAME}/") for row in found} <= set(content)


def test_a_limit_leaves_files_unfetched(files, hub):
    files.update({f"{name}.parquet": parquet(text, text) for name, text in SPLITS.items()})
    del files["data/train-00001-of-00002.parquet"]
    files["data/train-00001-of-00002.parquet"] = b"never looked at"
    assert [row.place for row in read(limit=2)] == [f"{NAME}/data/train-00000-of-00002.parquet:{i}" for i in (1, 2)]
    with pytest.raises(PromptError, match=r"^org/stories/data/train-00001-of-00002\.parquet:1: cannot be read as"):
        read(limit=3)


def of_one_text() -> bytes:
    named = pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int32()), pa.array(["x" * 2**16]))
    return table(pa.table({"text": named}))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train.parquet", of_one_text, "unpack to more than 1,024 times"),
        ("train.jsonl.zst", lambda: zstandard.compress(b'{"text": "' + b"x" * 2**28), "more than 1,024 times its size"),
        ("train.csv", lambda: b"text\n" + b"x" * 2**25, "a row has more than"),
    ],
)
def test_a_file_that_is_a_bomb_is_refused_by_its_name_and_not_unpacked(files, name, content, reason):
    files[name] = content()
    before = pa.total_allocated_bytes()
    with pytest.raises(PromptError, match=rf"^org/stories/{name}:\d+: .*({reason})"):
        read()
    assert pa.total_allocated_bytes() - before < 2**26


@pytest.mark.parametrize(
    ("content", "settings", "reason"),
    [
        (OF_CARD, {}, r"\['main', 'short'\].*; name what it has in `split` and `config`"),
        (OF_CARD, {"config": "main", "split": "dev"}, "has no split 'validation'; there are 'train': name one"),
        (
            {"a.tar": b"-"},
            {},
            "its files are read as 'webdataset', and of arrow, csv, json, parquet, text alone; downl",
        ),
        ({"train.zip": b"PK\5\6" + b"\0" * 18}, {}, "org/stories"),
        (
            {"README.md": card({"config_name": "x", "data_files": "a.json", "field": "data"}), "a.json": b"{}"},
            {},
            "its card sets 'field', which is not followed; download",
        ),
        ({"a.bin": b"-"}, {}, r"No \(supported\) data files found"),
    ],
)
def test_what_is_not_read_is_one_sentence(files, content, settings, reason):
    files.update(content)
    with pytest.raises(PromptError, match=reason) as caught:
        read(**settings)
    assert "\n" not in str(caught.value)


def test_a_card_that_names_a_file_of_this_machine_reads_none(files, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_bytes(lines("private"))
    files.update({"README.md": card({"config_name": "x", "data_files": str(own)}), "a.jsonl": lines("a")})
    with pytest.raises(PromptError, match=rf"^{NAME}: (cannot be read|its card names)"):
        read()


def test_the_content_of_a_data_set_is_the_revision_at_which_it_is_read(files, monkeypatch):
    files["train.jsonl"] = lines("a")
    asked = []
    monkeypatch.setattr("teacher_cache.prompts.prompts.read_hub", lambda *args: asked.append(args) or [("a", 1, {})])
    read()
    assert content_hash(PromptSource(source="s", path=NAME, format="text")) == f"hub:{NAME}@{asked[0][1]}"
