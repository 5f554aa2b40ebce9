"""Training on a live teacher, as the fidelity script does it, against training on a capture that holds the whole
vocabulary.
"""

from __future__ import annotations

import pytest
import torch

from shared.cache.cache import Cache
from shared.recipe.recipe import Recipe
from student_train.records.metrics_log import read_steps
from student_train.student.row_separation import separate_rows
from tests.student_train.tiny_caches import make_cache
from tests.tiny_models import make_llama, make_qwen3
from tools.bench.students.fidelity import LIVE, dense_kl, load, summary, train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("fidelity")
    teacher = make_qwen3(root / "teacher", seed=1)
    return (
        teacher,
        make_cache(root / "cache", teacher, num_rows=24, k=512),
        make_llama(root / "student", seed=2, spread=0.05),
    )


@pytest.mark.slow
def test_live_teacher_gives_the_losses_of_a_capture_of_everything(tiny, tmp_path):
    teacher_dir, cache, student = tiny
    teacher = load(teacher_dir)
    separate_rows(teacher, 512)
    logs = []
    for name, live in (("cached", None), ("live", teacher)):
        losses = [{"name": "forward_kl", "weight": 0.9}, {"name": "cross_entropy", "weight": 0.1}]
        trainer = {
            "max_steps": 3,
            "pack_tokens": 192,
            "learning_rate": 3e-3,
            "report_to": "none",
            "gradient_accumulation_steps": 2,
        }
        document = {
            "name": "x",
            "output_dir": str(tmp_path / name),
            "cache": str(cache),
            "student": {"model": str(student)},
        }
        recipe = Recipe.model_validate({**document, "stages": [{"name": "kd", "losses": losses, "trainer": trainer}]})
        train(recipe, live)
        logs.append(read_steps(tmp_path / name / "train/kd/metrics.jsonl"))
    for cached, lived in zip(*logs, strict=True):
        assert cached["positions"] == lived["positions"]
        for term in ("forward_kl", "cross_entropy"):
            assert cached["terms"][term] == pytest.approx(lived["terms"][term], rel=2e-3), (
                "the codec rounds to 1/16 nat"
            )
        assert cached["grad_norm"] == pytest.approx(lived["grad_norm"], rel=5e-3)


def test_dense_divergence_is_zero_from_itself_and_that_of_float64_maths_otherwise(tiny):
    teacher_dir, path, student_dir = tiny
    teacher, student, cache = load(teacher_dir), load(student_dir), Cache.open(path)
    assert dense_kl(teacher, teacher, cache, 0.5) == pytest.approx(0, abs=1e-12)
    from student_train.evaluate.heldout_rows import heldout_rows

    values = []
    for _, number in heldout_rows([cache], 0.5, None):
        row = cache[number]
        ids = torch.from_numpy(row.token_ids.astype("int64"))[None]
        with torch.no_grad():
            p, q = (
                model(input_ids=ids).logits[0, row.predictor_index()].double().softmax(-1)
                for model in (teacher, student)
            )
        values += (p * (p / q).log()).sum(-1).tolist()
    assert dense_kl(teacher, student, cache, 0.5) == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_table_compares_with_the_live_teacher():
    text = summary({LIVE: [0.2, 0.4], "top 64": [0.3, 0.33]}, {"top 64": 21.25})
    assert "| live, full vocabulary | - | 0.30000 | 0.14142 | +0.00 % |" in text
    assert "| top 64 | 21.2 | 0.31500 | 0.02121 | +5.00 % |" in text
