"""Small files of a stage that are not what was written are named with a way out, whatever they hold."""

from __future__ import annotations

import pytest

from shared.errors import TrainingError
from student_train.records.kept_json import read_kept
from student_train.records.metrics_log import StepLog, read_steps
from student_train.stage.stages import run_stages
from tools.rounds.publish import published_rounds

NOT_WRITTEN = ["", "[1, 2]", "5", '{"stage": ', "[" * 100_000, '{"stage": 1, "stage": 2}', "\0" * 10]


@pytest.mark.parametrize("text", NOT_WRITTEN)
def test_a_file_that_holds_something_else_is_named_with_a_way_out(tmp_path, text):
    path = tmp_path / "identity.json"
    path.write_text(text)
    with pytest.raises(TrainingError, match=r"identity\.json is not what a training wrote there .*; put it back"):
        read_kept(path, "stage")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TrainingError, match=r"identity\.json is not what a training wrote"):
        read_kept(path, "stage")
    path.write_text('{"stage": {}}')
    assert read_kept(path, "stage") == {"stage": {}}


@pytest.mark.parametrize(
    "text", [*NOT_WRITTEN, '{"stage": 5}', '{"stage": {"losses": [1]}}', '{"stage": {"losses": 1}}']
)
def test_a_begun_stage_whose_identity_was_altered_is_refused_not_trained_over(recipe_of, text):
    recipe = recipe_of()
    path = recipe.stage_dir("kd") / "identity.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(TrainingError, match=r"identity\.json (is not what a training wrote|names no losses)"):
        run_stages(recipe)
    assert path.read_text() == text


@pytest.mark.parametrize(
    "line", ["[1]", '{"step": "x"}', '{"step": null}', "{}", "[" * 100_000, '{"step": 1, "step": 2}']
)
def test_a_line_of_a_log_that_is_no_step_is_named_and_nothing_is_cut(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    for read in (lambda: StepLog(path, 5), lambda: read_steps(path)):
        with pytest.raises(TrainingError, match=r"metrics\.jsonl:2 is no record of a step"):
            read()
    assert path.read_text() == '{"step": 1}\n' + line + "\n"


def test_the_marker_of_finished_rounds_is_not_believed_where_it_says_something_else(recipe_of):
    recipe = recipe_of()
    stage, path = recipe.stages[0], recipe.stage_dir("kd") / "done.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"rounds": "many"}')
    assert published_rounds(recipe, stage) == 0
    path.write_text("[" * 100_000)
    with pytest.raises(TrainingError, match=r"done\.json is not what a training wrote"):
        published_rounds(recipe, stage)
