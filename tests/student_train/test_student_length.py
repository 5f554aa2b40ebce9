"""A student's own positions bound its rows, where its config sets a bound and rows are longer."""

from __future__ import annotations

import json

import pytest

from shared.errors import TrainingError
from shared.recipe.recipe import Stage, Student
from student_train.stage.student_length import student_positions, within_positions


def student(path, **config):
    (path / "config.json").write_text(json.dumps(config))
    return Student(model=str(path))


def stage(**settings):
    trainer = {"pack_tokens": 64}
    return Stage.model_validate({"name": "s", "losses": [{"name": "cross_entropy"}], "trainer": trainer, **settings})


@pytest.mark.parametrize(
    "config", [{"model_type": "gpt2", "n_positions": 16}, {"model_type": "llama", "max_position_embeddings": 16}]
)
def test_rows_are_bounded_by_positions_only_where_they_are_longer(tmp_path, config):
    learner = student(tmp_path, **config)
    assert within_positions(stage(), learner, 17).max_length == 16
    assert within_positions(stage(max_length=20), learner, 100).max_length == 16
    for unchanged, longest in ((stage(), 16), (stage(max_length=16), 100), (stage(max_length=9), 100)):
        assert within_positions(unchanged, learner, longest) is unchanged
    with pytest.raises(TrainingError, match="knows 16 positions and stage 's' has rows of up to 30 tokens"):
        within_positions(stage(too_long="refuse"), learner, 30)


@pytest.mark.parametrize("rope", [{"type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0}])
def test_a_stretched_rotation_sets_no_bound(tmp_path, rope):
    learner = student(tmp_path, model_type="llama", max_position_embeddings=16, rope_scaling=rope)
    assert student_positions(learner) is None
    assert within_positions(stage(), learner, 60).max_length is None


def test_config_that_cannot_be_read_is_left_to_loading(tmp_path):
    assert student_positions(Student(model=str(tmp_path / "none"))) is None
