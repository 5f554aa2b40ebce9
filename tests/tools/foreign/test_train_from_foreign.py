"""A student trains from a cache alone: of every foreign format, and of a copied cache whose teacher is nowhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shared.recipe.file import load_recipe
from tests.tiny_models import make_qwen3
from tests.tools.foreign.peers import (
    chat_line,
    samples,
    settings_of,
    write_axolotl,
    write_distillkit,
    write_megatron,
    write_older_distillkit,
)
from tools import cli

ROOT = Path(__file__).resolve().parents[3]
OLDER = {"k": 12, "exact_k": 5, "polynomial_degree": 2, "vocab_size": 512}


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return make_qwen3(tmp_path_factory.mktemp("student") / "student")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(form: str, tokenizer) -> list[str]:
    made = samples(8, least=20, most=21)
    if form == "distillkit":
        write_distillkit(Path("files"), made, settings_of())
    elif form == "older distillkit":
        write_older_distillkit(Path("files"), made, OLDER)
    elif form == "axolotl":
        Path("files").mkdir()
        write_axolotl(Path("files/kd.parquet"), made, 6, temperature=1.0, shift=1)
    elif form == "openai":
        asked = [[{"role": "user", "content": f"How many are {n} apples?"}] for n in range(len(made))]
        lines = [chat_line(tokenizer, messages, sample, 5) for messages, sample in zip(asked, made, strict=True)]
        Path("files").mkdir()
        Path("files/answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return ["--tail", "derived"]
    else:
        return ["--token-ids", str(write_megatron(Path("files"), made, 10))]
    return []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "loss"),
    [
        ("distillkit", "forward_kl"),
        ("older distillkit", "head_kl"),
        ("axolotl", "head_kl"),
        ("openai", "forward_kl"),
        ("megatron", "forward_kl"),
    ],
)
def test_every_format_trains_with_the_losses_that_it_can_give(student, form, loss):
    from transformers import AutoTokenizer

    words = write(form, AutoTokenizer.from_pretrained(student))
    assert cli.main(["cache", "import", "files", "cache", "--tokenizer", str(student), *words]) == 0
    assert cli.main(["init", "small", "--cache", "cache", "--student", str(student)]) == 0
    recipe = load_recipe(Path("recipes/small.yaml"))
    assert [term.name for term in recipe.stages[0].losses] == [loss, "cross_entropy"]
    few = ["--set", "stages.kd.trainer.max_steps=3", "--set", "stages.kd.trainer.learning_rate=0.01"]
    assert cli.main(["train", "recipes/small.yaml", *few]) == 0
    lines = [json.loads(line) for line in Path("runs/small/train/kd/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]


def test_losses_that_need_the_tail_are_refused_where_it_is_unknown(student, capsys):
    write("axolotl", None)
    assert cli.main(["cache", "import", "files", "cache", "--tokenizer", str(student)]) == 0
    assert cli.main(["init", "small", "--cache", "cache", "--student", str(student)]) == 0
    text = Path("recipes/small.yaml").read_text()
    Path("recipes/small.yaml").write_text(text.replace("head_kl", "forward_kl"))
    capsys.readouterr()
    assert cli.main(["train", "recipes/small.yaml"]) == 2
    error = capsys.readouterr().err
    line = next(n for n, one in enumerate(text.splitlines(), 1) if "head_kl" in one)
    assert f"small.yaml:{line}: stages.0.losses.0.name" in error
    assert "its head, and the tail of layer top6 is unknown" in error
    assert not Path("runs").exists()


def test_a_starter_from_a_cache_asks_for_a_student_and_no_teacher(student, capsys):
    shutil.copytree(ROOT / "data/golden/run-1/cache", "cache")
    for words, message in (
        ([], "--student"),
        (["--student", "s", "--teacher", "t"], "leave --teacher out"),
        (["--student", "s", "--prompts", "p"], "leave --prompts out"),
    ):
        assert cli.main(["init", "small", "--cache", "cache", *words]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["init", "small", "--cache", "nowhere", "--student", "s"]) == 2
    assert not Path("recipes").exists()


@pytest.mark.slow
def test_a_copied_cache_trains_and_is_reported_without_a_teacher():
    shutil.copytree(ROOT / "data/golden/run-1/cache", "pulled")
    shutil.copytree(ROOT / "data/golden/run-1/student", "student")
    assert cli.main(["init", "small", "--cache", "pulled", "--student", "student"]) == 0
    assert cli.main(["run", "recipes/small.yaml", "--set", "stages.kd.trainer.max_steps=3"]) == 0
    report = json.loads(Path("runs/small/report.json").read_text())
    assert set(report["models"]) == {"base", "kd"}
    assert all(model["heldout"]["positions"] > 0 for model in report["models"].values())
    assert Path("runs/small/report.html").stat().st_size > 10_000
