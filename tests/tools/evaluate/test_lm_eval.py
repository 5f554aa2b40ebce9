"""lm-evaluation-harness: what is asked of it, what is folded into the report, what is reused, and a real local task
offline.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.errors import EvaluationError, UsageError
from shared.recipe.recipe import Recipe
from tests.tiny_models import make_qwen3
from tools.cli import main
from tools.evaluate.lm_eval import lm_eval_tasks
from tools.evaluate.lm_eval.lm_eval_tasks import fold, parse_tasks, run_lm_eval
from tools.phases import evaluate
from tools.report.figures import report_figures
from tools.report.more_tables import lm_eval_table
from tools.report.run_files import read_run

DEMO_STUDENT = Path(__file__).parents[3] / "data" / "demo" / "student"
TASK = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def write_task(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    rows = [
        {"question": f"{i} + {i} =", "choices": [f" {2 * i}", f" {2 * i + 1}", " no idea"], "answer": 0}
        for i in range(8)
    ]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "sums.yaml").write_text(TASK.format(data=root / "sums.jsonl"))
    return root / "sums.yaml"


def recipe(root: Path, student: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "output_dir": str(root / "out"),
            "cache": str(root / "cache"),
            "heldout": {"fraction": 0},
            "student": {"model": str(student)},
            "evaluate": {"models": ["base"], "engine": "transformers"},
        }
    )


def test_tasks_are_names_and_files_with_hashes_of_all_that_they_name(tmp_path: Path) -> None:
    task = write_task(tmp_path / "tasks")
    found = parse_tasks(f"arc_easy, {task}")
    assert found.names == ("arc_easy", "sums")
    assert found.directories == (str(task.parent.resolve()),)
    assert found.needs_defaults
    assert set(found.files) == {str(task), str(tmp_path / "tasks" / "sums.jsonl")}
    alone = parse_tasks(str(task))
    assert not alone.needs_defaults
    (tmp_path / "tasks" / "sums.jsonl").write_text("{}")
    assert parse_tasks(str(task)).files != alone.files
    (tmp_path / "bad.yaml").write_text("dataset_path: json\n")
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9\ntask: a\n")
    for text, says in (
        (str(tmp_path / "bad.yaml"), "no line `task: NAME`"),
        (str(tmp_path / "latin.yaml"), "the text is not UTF-8 \\(byte 0xe9 after '# caf'\\); convert the file: iconv"),
        (str(tmp_path / "none.yaml"), "cannot be read \\(No such file or directory; restore it"),
        (" , ", "no task"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_tasks(text)


def test_a_name_that_the_harness_does_not_have_is_refused_before_any_model_runs(tmp_path: Path, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("tools.evaluate.all_models.evaluate_all", lambda *_: pytest.fail("a model ran"))
    chosen = recipe(tmp_path, DEMO_STUDENT)
    task = write_task(tmp_path / "tasks")
    with pytest.raises(UsageError, match=r"--lm-eval arc_eazy: .*did you mean 'arc_easy'\?"):
        evaluate(chosen, False, f"hellaswag,arc_eazy,{task}")


def test_a_task_file_of_one_endless_word_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("task: a\n# " + "o" * 2**20 + " " + ".json" * 2**18 + f" {'n' * 300}.csv\n")
    started = time.monotonic()
    assert list(parse_tasks(str(path)).files) == [str(path)]
    assert time.monotonic() - started < 20


def test_results_are_folded_with_their_errors_and_filters() -> None:
    results = {
        "a": {
            "alias": "a",
            "acc,none": 0.5,
            "acc_stderr,none": 0.25,
            "acc_norm,none": 1,
            "acc_norm_stderr,none": "N/A",
        },
        "b": {"alias": "b", "exact_match,strict": 0.0, "exact_match_stderr,strict": 0.0, "bad,none": float("nan")},
        "group": {"alias": "g"},
    }
    assert fold(results) == {
        "a": {"acc": {"value": 0.5, "stderr": 0.25}, "acc_norm": {"value": 1.0, "stderr": None}},
        "b": {"exact_match,strict": {"value": 0.0, "stderr": 0.0}},
    }
    models = {
        "base": {"lm_eval": fold(results)},
        "kd": {"lm_eval": {"a": {"acc": {"value": 0.75, "stderr": None}}}},
        "no": {},
    }
    table = lm_eval_table({"models": models})
    assert table.header == ("task", "metric", "base", "kd")
    assert table.rows[0] == ["a", "acc", "0.5000 ± 0.2500", "0.7500"]
    assert table.rows[1] == ["a", "acc_norm", "1.0000", "–"]


def test_only_new_weights_tasks_or_files_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[dict[str, Any]] = []

    def run(module: str, job: dict[str, Any], *_: Any) -> Any:
        jobs.append(job)
        return {"sums": {"acc": {"value": 0.5, "stderr": 0.1}}}

    monkeypatch.setattr(lm_eval_tasks, "run_in_process", run)
    monkeypatch.setattr(lm_eval_tasks, "require_lm_eval", lambda: None)
    monkeypatch.setattr(lm_eval_tasks, "metadata", SimpleNamespace(version=lambda name: "0.4"))
    chosen, task = recipe(tmp_path, make_qwen3(tmp_path / "student")), write_task(tmp_path / "tasks")
    for expected in (1, 1):
        assert run_lm_eval(chosen, parse_tasks(str(task)), lambda line: None)["base"]["sums"]["acc"]["value"] == 0.5
        assert len(jobs) == expected
    (task.parent / "sums.jsonl").write_text("{}\n")
    run_lm_eval(chosen, parse_tasks(str(task)), lambda line: None)
    make_qwen3(tmp_path / "student", seed=3)
    run_lm_eval(chosen, parse_tasks(str(task)), lambda line: None)
    assert len(jobs) == 3
    assert jobs[0]["names"] == ["sums"]
    assert jobs[0]["needs_defaults"] is False


def test_a_missing_package_is_one_sentence_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student, found = make_qwen3(tmp_path / "student", num_layers=1), importlib.util.find_spec
    (tmp_path / "recipe.yaml").write_text(recipe(tmp_path, student).model_dump_json(exclude_none=True))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name, *rest)
    )
    assert main(["eval", str(tmp_path / "recipe.yaml"), "--lm-eval", "arc_easy"]) == 1
    error = capsys.readouterr().err
    assert "pip install 'decant-kd[eval]'" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_local_task_runs_offline_with_the_demo_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("the extra `eval` is not installed")
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"), ("HF_HOME", str(tmp_path / "hf"))):
        monkeypatch.setenv(name, value)
    chosen, task = recipe(tmp_path, DEMO_STUDENT), write_task(tmp_path / "tasks")
    (tmp_path / "recipe.yaml").write_text(chosen.model_dump_json(exclude_none=True))
    assert main(["eval", str(tmp_path / "recipe.yaml"), "--lm-eval", str(task)]) == 0
    figures = report_figures([read_run(tmp_path / "out")])["models"]["base"]["lm_eval"]["sums"]["acc"]
    assert 0 <= figures["value"] <= 1
    assert figures["stderr"] >= 0
    assert figures["value"] * 8 == pytest.approx(round(figures["value"] * 8))
    (tmp_path / "tasks" / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: nothing.jsonl}\n"
    )
    with pytest.raises(EvaluationError, match="'base' cannot be evaluated: lm-evaluation-harness cannot run broken"):
        run_lm_eval(chosen, parse_tasks(str(tmp_path / "tasks" / "broken.yaml")), lambda line: None)
