"""`heldout.own`: every model's KL to the teacher on its own answers to held-out prompts, from dense distributions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from shared.cache.cache import Cache
from shared.identity.weights_hash import weights_hash
from shared.keys import is_heldout
from shared.parts.records import list_records
from student_train.stage.stages import run_stages
from teacher_cache.build import teach
from tests.tools.rounds.tiny_run import make_models, rounds_recipe
from tools.evaluate.all_models import evaluate_all
from tools.evaluate.models.models import model_under_test
from tools.evaluate.own.own_answers import own_identity
from tools.report.build import build_report
from tools.report.more_tables import more_tables
from tools.rounds.one_round import Round
from tools.rounds.steps import answer, score, train


def dense_kl(model_dir, teacher_dir, row) -> float:
    """Mean KL(teacher || model) over a row's positions, from full float32 distributions."""
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(row.token_ids.astype(np.int64))[None]
    places = torch.from_numpy(row.predictor_index().astype(np.int64))
    with torch.no_grad():
        log_p, log_q = (
            AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)(ids)
            .logits[0, places]
            .double()
            .log_softmax(-1)
            for place in (teacher_dir, model_dir)
        )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).sum())


@pytest.mark.parametrize("capture, k, draws", [({"k": 5}, 5, 0), ({"mode": "sample", "draws": 3}, 0, 3)])
def test_figures_kept_by_an_earlier_version_are_those_of_a_capture_with_every_option(tmp_path, capture, k, draws):
    asked = {"models": ["teacher"], "engine": "transformers", "own_answers": {}}
    recipe = rounds_recipe(tmp_path, make_models(tmp_path), evaluate=asked, capture=capture)
    kept = {"mode": "top", "temperatures": [1.0], "gap_step": 0.0625, "label": "apart", "mass": 1.0, **capture}
    found = own_identity(recipe, model_under_test(recipe, "teacher"))["capture"]
    assert found == {**kept, "k": k, "draws": draws}


@pytest.mark.slow
def test_every_model_is_measured_on_its_own_answers_to_held_out_prompts(tmp_path):
    asked = {"models": ["teacher", "own"], "engine": "transformers", "own_answers": {"max_new_tokens": 12}}
    student = make_models(tmp_path)[1]
    lora = {"model": str(student), "adapter": {"kind": "lora", "r": 4}}
    recipe = rounds_recipe(
        tmp_path, make_models(tmp_path), rounds={"count": 1}, evaluate=asked, capture={"k": 512}, student=lora
    )
    teach(recipe)
    run_stages(recipe, "kd", "kd")
    for step in (answer, score, train):
        step(Round(recipe, recipe.stage("own"), 1))
    results = evaluate_all(recipe, say=lambda line: None)
    cache = Cache.open(recipe.output_dir / "own" / "heldout")
    rows = [cache[i] for i in range(len(cache))]
    assert all(is_heldout(row.group_key, recipe.heldout.fraction) for row in rows)
    owner = {record.id8: record.software["weights"] for record in list_records(cache.path / "sequences")}
    place = recipe.stage_dir("own") / "model"
    (id8,) = (job for job, weights in owner.items() if weights == weights_hash(place))
    mine = [rows[i] for job, start, end in cache.jobs_of_rows() if job == id8 for i in range(start, end)]
    own = results["own"]["heldout"]["own"]
    wanted = sum(dense_kl(place, recipe.teacher.model, row) for row in mine) / sum(row.num_positions for row in mine)
    assert own["kl_nats"] == pytest.approx(wanted, rel=0.02)
    assert (own["rows"], own["answers"]["answers"]) == (len(mine), len(mine))
    assert results["teacher"]["heldout"]["own"]["kl_nats"] == pytest.approx(0.0, abs=1e-3)
    again = json.loads((recipe.output_dir / "evaluate" / "own.json").read_text())["heldout"]["own"]
    assert (
        again
        == results["own"]["heldout"]["own"]
        == evaluate_all(recipe, say=lambda line: None)["own"]["heldout"]["own"]
    )
    report = build_report([recipe.output_dir], None)
    tables = {table.title: table.rows for table in more_tables(report)}
    assert {row[0] for row in tables["On each model's own answers to held-out prompts"]} == {"teacher", "own"}
    assert [row[:2] for row in tables["Rounds of own answers"]] == [["own", "1"]]
