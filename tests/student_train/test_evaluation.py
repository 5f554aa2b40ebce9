"""Evaluating while training: right figures, no trace in the training, resumed exactly, stopped and kept as asked."""

from __future__ import annotations

import json
import math
import signal

import pytest

from shared.errors import RecipeError, TrainingError
from student_train.evaluate.verdict import judge
from student_train.records.checkpoints import list_checkpoints
from student_train.records.metrics_log import read_steps
from student_train.stage.stages import run_stages
from student_train.student.forward_patch import Objective

LORA = {"adapter": {"kind": "lora", "r": 4, "dropout": 0.2}}


def stage_dir(recipe):
    return recipe.output_dir / "train/kd"


def evaluations(recipe):
    return read_steps(stage_dir(recipe) / "evaluations.jsonl")


def elsewhere(recipe, name):
    return recipe.model_copy(update={"output_dir": recipe.output_dir.with_name(name)})


def outcome(recipe, *names):
    names = names or ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "health.json", "model/model.safetensors")
    return {name: (stage_dir(recipe) / name).read_bytes() for name in names}


@pytest.mark.slow
def test_figures_equal_those_of_the_evaluation_of_the_saved_model(recipe_of, tiny):
    from tools.evaluate.heldout.heldout import evaluate_heldout

    recipe = recipe_of(evaluate={"every_steps": 4}, trainer={"learning_rate": 1e-2})
    run_stages(recipe)
    found = evaluations(recipe)
    assert [figures["step"] for figures in found] == [0, 4, 6]
    for model, figures in ((tiny.qwen3, found[0]), (stage_dir(recipe) / "model", found[-1])):
        expected = evaluate_heldout(model, [tiny.cache], 0.1)
        for part, wanted in [(figures, expected)] + [
            (figures["by_source"][name], expected["by_source"][name]) for name in expected["by_source"]
        ]:
            assert part["kl_nats"] == pytest.approx(wanted["kl_nats"], rel=1e-4)
            assert part["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-4)
            assert (part["top1_agreement"], part["positions"], part["rows"]) == (
                wanted["top1_agreement"],
                wanted["positions"],
                wanted["rows"],
            )
    assert found[-1]["kl_nats"] < found[0]["kl_nats"]


@pytest.mark.slow
@pytest.mark.parametrize("student", [{}, LORA], ids=["all-weights", "lora-dropout"])
def test_evaluation_leaves_no_trace_in_the_training(recipe_of, student):
    plain = elsewhere(recipe_of(student=student), "plain")
    run_stages(plain)
    watched = recipe_of(student=student, evaluate={"every_steps": 2, "samples": 2, "sample_tokens": 4})
    run_stages(watched)
    names = ("metrics.jsonl", "model/model.safetensors", "identity.json")
    assert outcome(watched, *names) == outcome(plain, *names)


@pytest.mark.slow
def test_samples_stand_beside_the_cached_answer_in_file_and_tensorboard(recipe_of, tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = {"every_steps": 3, "samples": 3, "sample_tokens": 6, "rows_per_source": 2}
    recipe = recipe_of(evaluate=settings, trainer={"report_to": "tensorboard"})
    run_stages(recipe)
    lines = [json.loads(line) for line in (stage_dir(recipe) / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0] * 3 + [3] * 3 + [6] * 3
    assert [line["source"] for line in lines[:3]] == ["math", "ops", "math"]
    assert {line["prompt"] for line in lines[:3]} == {line["prompt"] for line in lines[6:]}
    assert all(line["teacher"].startswith("After ") for line in lines)
    directory = stage_dir(recipe) / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    for line in lines[6:]:
        ids = tokenizer(line["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert line["student"] == tokenizer.decode(output, skip_special_tokens=True)
    events = EventAccumulator(str(stage_dir(recipe) / "tensorboard")).Reload()
    kl = {event.step: event.value for event in events.Scalars("eval/kl_nats")}
    assert kl == {figures["step"]: pytest.approx(figures["kl_nats"], rel=1e-6) for figures in evaluations(recipe)}
    assert "eval/kl_nats/ops" in events.Tags()["scalars"]
    text = events.Tensors("samples/0-math/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert lines[6]["teacher"] in text


@pytest.mark.slow
def test_rows_per_source_and_fraction_bound_what_is_measured(recipe_of):
    recipe = recipe_of(evaluate={"every_steps": 6, "rows_per_source": 1}, trainer={"max_steps": 1})
    run_stages(recipe)
    assert [part["rows"] for part in evaluations(recipe)[0]["by_source"].values()] == [1, 1]
    with pytest.raises(TrainingError, match=r"no row is held out at heldout.fraction 1e-12"):
        from shared.recipe.recipe import Recipe

        run_stages(Recipe.model_validate({**recipe.model_dump(mode="json"), "heldout": {"fraction": 1e-12}}))


@pytest.mark.slow
def test_labels_alone_are_evaluated_against_the_teacher_too(recipe_of):
    recipe = recipe_of(losses=[{"name": "cross_entropy"}], evaluate={"every_steps": 3}, trainer={"max_steps": 3})
    run_stages(recipe)
    assert [figures["kl_nats"] > 0 for figures in evaluations(recipe)] == [True, True]


WORSENING = {"learning_rate": 0.3, "optim": "sgd", "max_steps": 12, "lr_scheduler_type": "constant", "save_steps": 100}


@pytest.mark.slow
def test_stage_stops_when_patience_is_used_up_and_keeps_the_best_weights(recipe_of, tiny):
    from tools.evaluate.heldout.heldout import evaluate_heldout

    course = {"every_steps": 1, "early_stopping": {"patience": 2}, "keep_best": True}
    trainer = {**WORSENING, "learning_rate": 3.0, "optim": "adamw_torch", "save_total_limit": 1}
    recipe = recipe_of(evaluate=course, trainer=trainer)
    run_stages(recipe)
    found = evaluations(recipe)
    kls = {figures["step"]: figures["kl_nats"] for figures in found if figures["step"]}
    best = min(kls, key=kls.get)
    last = max(kls)
    assert last == best + 2 < 12
    health = json.loads((stage_dir(recipe) / "health.json").read_text())
    assert health["checks"]["all_steps_done"]
    assert (health["stopped_early_at"], health["best_step"], health["model_is_of_step"]) == (last, best, best)
    assert [checkpoint.step for checkpoint in list_checkpoints(stage_dir(recipe))] == [best, last]
    assert evaluate_heldout(stage_dir(recipe) / "model", [tiny.cache], 0.1)["kl_nats"] == pytest.approx(
        kls[best], rel=1e-4
    )
    assert json.loads((stage_dir(recipe) / "done.json").read_text())["steps"] == last


@pytest.mark.slow
@pytest.mark.parametrize("student", [{}, LORA], ids=["all-weights", "lora-dropout"])
def test_stopped_stage_resumes_bitwise_equal_after_kills(recipe_of, run_apart, student):
    course = {"every_steps": 2, "samples": 1, "sample_tokens": 3, "keep_best": True}
    course["early_stopping"] = {"patience": 3, "min_delta_nats": 100.0}
    trainer = {
        "learning_rate": 0.1,
        "max_steps": 14,
        "lr_scheduler_type": "constant",
        "save_steps": 3,
        "save_total_limit": 1,
    }
    recipe = recipe_of(evaluate=course, trainer=trainer, student=student)
    assert run_apart(elsewhere(recipe, "whole"), None) == 0
    assert evaluations(elsewhere(recipe, "whole"))[-1]["step"] == 8
    for place in ("train_step.after_write@5", "checkpoint.before_marker@2", "export.before_write"):
        assert run_apart(recipe, place) == -signal.SIGKILL
    assert run_apart(recipe, None) == 0
    assert outcome(recipe) == outcome(elsewhere(recipe, "whole"))


def test_verdict_takes_the_lowest_and_counts_what_is_not_better_by_the_delta():
    from shared.recipe.recipe import EarlyStopping

    def of(*kls, patience=2, delta=0.0):
        evaluations = [{"step": 10 * i, "kl_nats": kl} for i, kl in enumerate(kls)]
        return judge(evaluations, EarlyStopping(patience=patience, min_delta_nats=delta))

    assert of(0.1).best_step is None, "the start has no checkpoint"
    assert (of(0.1, 0.5, 0.4, 0.4, 0.3).best_step, of(0.1, 0.5, 0.4, 0.4, 0.3).stops) == (40, False)
    assert of(9, 0.5, 0.4, 0.4, 0.4).stopped_at == 40
    assert of(9, 0.5, 0.46, 0.42, patience=2, delta=0.05).num_stale == 0, "0.42 is better than 0.5 by 0.08"
    assert of(9, 0.5, 0.48, 0.46, patience=2, delta=0.05).stopped_at == 30
    assert of(9, 0.5, 0.48, 0.46, patience=2, delta=0.05).best_step == 30
    assert of(9, None, None).best_step is None
    assert judge([{"step": 1, "kl_nats": 2.0}, {"step": 2, "kl_nats": 3.0}], None).stops is False


@pytest.mark.slow
def test_settings_that_decide_the_weights_belong_to_the_stage_and_the_others_do_not(recipe_of):
    small = {"max_steps": 2}
    run_stages(recipe_of(evaluate={"every_steps": 2}, trainer=small))
    run_stages(recipe_of(evaluate={"every_steps": 1, "samples": 1}, trainer=small))
    with pytest.raises(TrainingError, match=r"stage\.evaluate null where the recipe now has"):
        run_stages(recipe_of(evaluate={"every_steps": 1, "keep_best": True}, trainer=small))


def test_evaluation_without_held_out_rows_or_useless_options_is_refused(tmp_path):
    from shared.recipe.file import load_recipe

    base = "name: t\noutput_dir: r\ncache: c\nstudent: {model: m}\n"
    stage = "stages:\n  - name: kd\n    losses: [{name: forward_kl}]\n    evaluate: "
    for text, said in (
        (base + "heldout: {fraction: 0}\n" + stage + "{every_steps: 5}\n", "nothing to evaluate on"),
        (base + stage + "{every_steps: 5, sample_tokens: 9}\n", "there are no samples"),
        (base + stage + "{samples: 5}\n", "every_steps"),
    ):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(RecipeError, match=said):
            load_recipe(tmp_path / "recipe.yaml")


def test_evaluation_that_gives_no_number_is_null_and_the_stage_goes_on(recipe_of, monkeypatch):
    """A student may be lost for a while; keep_best and patience count such an evaluation as the worst."""
    stock, asked = Objective.take_scores, []

    def lost_in_the_middle(self):
        asked.append(scores := stock(self))
        if len(asked) == 3:  # of the second evaluation: each empties the store when it ends
            scores[:, 0] = math.nan
        return scores

    monkeypatch.setattr(Objective, "take_scores", lost_in_the_middle)
    recipe = recipe_of(evaluate={"every_steps": 2, "keep_best": True}, trainer={"pack_tokens": 4096})
    run_stages(recipe)
    found = [figures["kl_nats"] is None for figures in evaluations(recipe)]
    assert any(found) and not all(found)
    health = json.loads((stage_dir(recipe) / "health.json").read_text())
    assert health["best_step"] in [
        one["step"] for one, lost in zip(evaluations(recipe), found, strict=True) if not lost
    ]
