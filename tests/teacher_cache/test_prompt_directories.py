"""Which files of a directory are read: one split, one configuration, and what is left out is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import PromptError
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.files.prompt_directories import LocalFiles
from teacher_cache.prompts.files.prompt_files import content_hash, locate
from teacher_cache.prompts.problems import Problems
from teacher_cache.prompts.prompts import read_prompts

SHARD = "00000-of-00001.jsonl"


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f'{{"text": "{name}"}}\n')


def source(path: Path | str, **settings) -> PromptSource:
    return PromptSource(source="s", path=str(path), format="text", **settings)


def texts(path: Path | str, **settings) -> list[str]:
    return sorted(str(talk.text) for talk in read_prompts([source(path, **settings)], Problems()))


def note(path: Path | str, **settings) -> str:
    place = locate(source(path, **settings))
    assert isinstance(place, LocalFiles)
    return place.note or ""


@pytest.mark.parametrize(
    ("files", "settings", "read"),
    [
        (["train.jsonl", "test.jsonl"], {}, ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], {"split": "test"}, ["test.jsonl"]),
        ([f"data/train-{SHARD}", f"data/validation-{SHARD}"], {"split": "validation"}, [f"data/validation-{SHARD}"]),
        ([f"data/train-{SHARD}", f"data/validation-{SHARD}"], {"split": "dev"}, [f"data/validation-{SHARD}"]),
        (
            [f"data/train_sft-{SHARD}", f"data/test_sft-{SHARD}"],
            {"split": "train_sft"},
            [f"data/train_sft-{SHARD}"],
        ),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], {}, ["train/a.jsonl", "train/b.jsonl"]),
        (["rows.jsonl", "dev.jsonl"], {}, ["rows.jsonl"]),
        (["a.jsonl", "b.jsonl", ".cache/c.jsonl"], {}, ["a.jsonl", "b.jsonl"]),
        (["main/train.jsonl", "other/train.jsonl"], {"config": "main"}, ["main/train.jsonl"]),
        (["main/train.jsonl", "main/test.jsonl", "x/train.jsonl"], {"config": "main"}, ["main/train.jsonl"]),
        (["default/train/0.jsonl", "default/test/0.jsonl"], {}, ["default/train/0.jsonl"]),
        (["deep/er/a.jsonl"], {}, ["deep/er/a.jsonl"]),
        (["a.jsonl", "dataset_info.json", "notes.txt", "README.md"], {}, ["a.jsonl"]),
        (["Train.JSONL", "Test.JSONL"], {}, ["Train.JSONL"]),
        (["Train.jsonl", "Test.jsonl"], {"split": "test"}, ["Test.jsonl"]),
        (["TRAIN/a.jsonl", "VAL/a.jsonl"], {"split": "validation"}, ["VAL/a.jsonl"]),
        (["A.JSONL", "NOTES.TXT"], {}, ["A.JSONL"]),
        (["trainA.jsonl", "testA.jsonl", "latestA.jsonl"], {}, ["latestA.jsonl", "trainA.jsonl"]),
        (["mySet/TrainPart.jsonl", "mySet/TestPart.jsonl"], {"split": "test"}, ["mySet/TestPart.jsonl"]),
    ],
)
def test_the_files_of_one_split_and_configuration_are_read(tmp_path, files, settings, read):
    put(tmp_path, *files)
    assert texts(tmp_path, **settings) == read


@pytest.mark.parametrize(
    ("files", "settings", "reason"),
    [
        (["train.jsonl", "test.jsonl"], {"split": "nonsense"}, "no split 'nonsense' .* there are 'train', 'test'"),
        (["test.jsonl"], {}, "no split 'train' .* there are 'test'"),
        (["a.jsonl"], {"split": "test"}, "no split 'test'"),
        (["main/train.jsonl", "other/train.jsonl"], {}, r"several configurations \('main', 'other'\); name one with"),
        (["a.jsonl", "more/b.jsonl"], {}, r"several configurations \('\.', 'more'\)"),
        (["main/train.jsonl"], {"config": "socratic"}, "no configuration 'socratic'; there are 'main'"),
        (["a.jsonl", "b.csv"], {}, r"several kinds \(csv, json\)"),
        (["notes.md"], {}, "the directory has no .jsonl"),
    ],
)
def test_what_names_do_not_tell_is_refused_with_what_there_is(tmp_path, files, settings, reason):
    put(tmp_path, *files)
    with pytest.raises(PromptError, match=reason):
        texts(tmp_path, **settings)


def test_advice_to_take_all_configurations_works(tmp_path):
    put(tmp_path, "main/train.jsonl", "other/train.jsonl")
    with pytest.raises(PromptError) as caught:
        texts(tmp_path)
    glob = str(caught.value).rpartition("a glob such as ")[2]
    assert texts(glob) == ["main/train.jsonl", "other/train.jsonl"]


def test_what_is_left_out_is_said(tmp_path):
    put(tmp_path, "train.jsonl", "test.jsonl", "extra.jsonl")
    assert note(tmp_path).endswith(
        f"{tmp_path}: split 'train' is read, not 'test'; source s: {tmp_path}: files that are not read: 'extra.jsonl'"
    )
    problems = Problems()
    list(read_prompts([source(tmp_path)], problems))
    assert problems.notes() == [note(tmp_path)]
    put(tmp_path / "plain", "a.jsonl", "b.jsonl")
    assert note(tmp_path / "plain") == ""


@pytest.mark.parametrize("name", ["data [v2]", "what?", "all*"])
def test_a_directory_whose_name_would_be_a_pattern_is_read_and_its_advice_works(tmp_path, name):
    put(tmp_path / name, "train.jsonl", "test.jsonl")
    put(tmp_path / f"{name} of others", "train.jsonl", "a/test.jsonl", "b/test.jsonl")
    assert [path.name for path in locate(source(tmp_path / name)).paths] == ["train.jsonl"]
    with pytest.raises(PromptError, match="several configurations") as caught:
        locate(source(tmp_path / f"{name} of others", split="test"))
    pattern = str(caught.value).rpartition("a glob such as ")[2]
    assert len(locate(source(pattern, split="test")).paths) == 2


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (["a.jsonl", "b.json"], ["b.json"]),
        (["a.csv", "more.txt", "table.json"], ["more.txt", "table.json"]),
        (["a.txt", "b.md", "c.pdf"], ["b.md", "c.pdf"]),
        (["train/a.jsonl", "train/b.xlsx", "scripts/make.py"], ["scripts/make.py", "train/b.xlsx"]),
        (["a.jsonl", "README.md", "LICENSE.txt", "dataset_info.json", ".gitattributes"], []),
    ],
)
def test_files_that_are_not_read_are_named(tmp_path, files, left):
    put(tmp_path, *files)
    if "a.csv" in files:
        (tmp_path / "a.csv").write_text("text\na\n")
    assert all(f"'{name}'" in note(tmp_path) for name in left)
    assert ("not read" in note(tmp_path)) == bool(left)


def test_a_card_says_which_files_are_which_configuration(tmp_path):
    put(tmp_path, "m/a.jsonl", "m/b.jsonl", "s.jsonl", "old.jsonl")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: m/a.jsonl\n  - split: held\n"
        "    path: m/b.jsonl\n- config_name: soc\n  data_files: s.jsonl\n---\n"
    )
    assert texts(tmp_path, config="main") == ["m/a.jsonl"]
    assert texts(tmp_path, config="main", split="held") == ["m/b.jsonl"]
    assert texts(tmp_path, config="soc") == ["s.jsonl"]
    assert "not read: 'old.jsonl', 's.jsonl'" in note(tmp_path, config="main")
    for settings in ({}, {"config": "nope"}):
        with pytest.raises(PromptError, match="there are 'main', 'soc', name one with `config`"):
            texts(tmp_path, **settings)


def test_saved_data_sets_are_read_by_their_own_lists(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    both = datasets.DatasetDict({"train": rows.select([0]), "test": rows.select([1])})
    both.save_to_disk(str(tmp_path / "both"))
    (tmp_path / "both" / "train" / "cache-1.arrow").write_bytes(b"not data of the user")
    assert texts(tmp_path / "both") == ["one"]
    assert texts(tmp_path / "both", split="test") == ["two"]
    assert "split 'train' is read, not 'test'" in note(tmp_path / "both")
    with pytest.raises(PromptError, match="no split 'nonsense'; there are 'train', 'test'"):
        texts(tmp_path / "both", split="nonsense")
    rows.save_to_disk(str(tmp_path / "one"))
    assert texts(tmp_path / "one") == ["one", "two"]
    with pytest.raises(PromptError, match="one saved data set has no splits"):
        texts(tmp_path / "one", split="test")


def test_a_glob_that_spans_splits_reads_one_of_them(tmp_path):
    put(tmp_path, "train-a.jsonl", "train-b.jsonl", "test-a.jsonl", "sub/dev/c.jsonl")
    assert texts(tmp_path / "*.jsonl") == ["train-a.jsonl", "train-b.jsonl"]
    assert texts(tmp_path / "*.jsonl", split="test") == ["test-a.jsonl"]
    assert texts(tmp_path / "test*.jsonl") == ["test-a.jsonl"]  # named by the user
    assert texts(tmp_path / "**/*.jsonl", split="validation") == ["sub/dev/c.jsonl"]
    for settings, reason in (({"split": "dev"}, "no split 'dev'"), ({"config": "x"}, "leave `config` out")):
        with pytest.raises(PromptError, match=reason):
            texts(tmp_path / "*.jsonl", **settings)


def test_one_file_has_the_split_that_its_name_tells_or_none(tmp_path):
    put(tmp_path, "test.jsonl", "rows.jsonl")
    assert texts(tmp_path / "test.jsonl") == texts(tmp_path / "test.jsonl", split="test") == ["test.jsonl"]
    for name, split in (("rows.jsonl", "test"), ("test.jsonl", "validation")):
        with pytest.raises(PromptError, match=f"leave `split` out, or name the file of '{split}'"):
            texts(tmp_path / name, split=split)


def test_a_directory_without_splits_hashes_as_its_files_in_order(tmp_path):
    put(tmp_path, "b/rows.jsonl")
    (tmp_path / "b/rows.jsonl").rename(tmp_path / "rows.jsonl")
    assert content_hash(source(tmp_path)) == content_hash(source(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("pattern", ["**/*.jsonl", "*/algebra/*.jsonl", "*/*/0.jsonl"])
def test_a_glob_tells_splits_by_folders_above_others_too(tmp_path, pattern):
    put(tmp_path, *(f"{split}/{part}/0.jsonl" for split in ("train", "test") for part in ("algebra", "latest")))
    assert {Path(name).parts[0] for name in texts(tmp_path / pattern)} == {"train"}
    assert {Path(name).parts[0] for name in texts(tmp_path / pattern, split="test")} == {"test"}
    assert "split 'train' is read, not 'test'" in note(tmp_path / pattern)
