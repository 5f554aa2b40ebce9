"""What moves over a stage's steps: over the run, by evaluations, by balance; and all of it after a kill."""

from __future__ import annotations

import json
import math
import signal

import pytest

from shared.errors import TrainingError
from shared.recipe.recipe import Recipe, Sampling
from student_train.order.evaluation_sampling import next_shares, within_bounds
from student_train.records.checkpoints import list_checkpoints
from student_train.records.metrics_log import read_steps
from student_train.stage.stage_work import resolve_stage
from student_train.stage.stages import run_stages

SAMPLING = {
    "evaluate": {"every_steps": 2},
    "sampling": {"kind": "evaluation", "floor": 0.05, "ceiling": 0.9, "smoothing": 0.25},
    "mixture": {"math": 0.8, "ops": 0.2},
}
FILES = ("metrics.jsonl", "evaluations.jsonl", "health.json", "model/model.safetensors")


def elsewhere(recipe, name):
    return recipe.model_copy(update={"output_dir": recipe.output_dir.with_name(name)})


def directory(recipe, name="kd"):
    return recipe.output_dir / "train" / name


def outcome(recipe):
    return {name: (directory(recipe) / name).read_bytes() for name in FILES}


def steps_of(recipe, name="kd"):
    return read_steps(directory(recipe, name) / "metrics.jsonl")


def with_stages(recipe, stages):
    return Recipe.model_validate({**recipe.model_dump(mode="json"), "stages": stages})


@pytest.mark.slow
def test_weights_and_temperatures_over_the_run_pass_through_its_stages(recipe_of):
    weight = {"kind": "linear", "start": 1.0, "end": 0.0, "over": "run"}
    temperature = {"kind": "step", "values": [2.0, 1.0], "at": [0.5], "over": "run"}
    losses = [{"name": "forward_kl", "weight": weight, "temperature": temperature}, {"name": "cross_entropy"}]
    trainer = {"max_steps": 4, "pack_tokens": 192, "report_to": "none"}
    by_epochs = {"num_train_epochs": 0.5, "pack_tokens": 192, "report_to": "none"}
    stages = [
        {"name": "one", "losses": losses, "trainer": trainer},
        {"name": "two", "init_from": "previous", "losses": losses, "trainer": by_epochs},
    ]
    recipe = with_stages(recipe_of(), stages)
    run_stages(recipe, to_stage="one")
    run_stages(recipe, from_stage="two")
    seen = [*steps_of(recipe, "one"), *steps_of(recipe, "two")]
    assert len(seen) > 8
    for i, step in enumerate(seen):
        progress = i / (len(seen) - 1)
        assert step["weights"]["forward_kl"] == pytest.approx(1 - progress)
        assert step["temperatures"]["forward_kl"] == (2.0 if progress < 0.5 else 1.0)
        expected = step["weights"]["forward_kl"] * step["terms"]["forward_kl"] + step["terms"]["cross_entropy"]
        assert step["loss"] == pytest.approx(expected, rel=1e-5)
    longer = with_stages(recipe_of(), [stages[0], {**stages[1], "trainer": {**by_epochs, "num_train_epochs": 1.0}}])
    with pytest.raises(TrainingError, match=r"stage\.run\.steps"):
        run_stages(longer, to_stage="one")


def test_schedule_over_a_run_whose_steps_are_unknown_is_refused(recipe_of):
    weight = {"kind": "linear", "start": 1.0, "end": 0.0, "over": "run"}
    one = {"name": "one", "losses": [{"name": "forward_kl", "weight": weight}]}
    two = {
        "name": "two",
        "losses": [{"name": "forward_kl"}],
        "evaluate": {"every_steps": 1, "early_stopping": {"patience": 1}},
    }
    with pytest.raises(ValueError, match="whose number of steps is unknown since stage 'two' may stop early"):
        with_stages(recipe_of(), [one, two])
    with pytest.raises(ValueError, match="a constant schedule does not use it"):
        with_stages(recipe_of(), [{**one, "losses": [{"name": "forward_kl", "weight": {"start": 1.0, "over": "run"}}]}])


@pytest.mark.slow
def test_shares_follow_the_evaluations_and_the_steps_follow_the_shares(recipe_of):
    recipe = recipe_of(**SAMPLING, trainer={"max_steps": 12, "per_device_train_batch_size": 3, "learning_rate": 1e-2})
    run_stages(recipe)
    newest = list_checkpoints(directory(recipe))[-1]
    history = json.loads((newest.path / "course.json").read_text())["shares"]
    rule = Sampling.model_validate(SAMPLING["sampling"])
    base = within_bounds(SAMPLING["mixture"], rule.floor, rule.ceiling)
    expected, before = [], base
    for figures in read_steps(directory(recipe) / "evaluations.jsonl")[:6]:
        before = next_shares(before, base, {name: part["kl_nats"] for name, part in figures["by_source"].items()}, rule)
        expected.append(before)
    assert history == expected
    assert all(set(shares) == {"math", "ops"} and shares["math"] <= 0.9 for shares in history)
    steps = steps_of(recipe)
    for k, shares in enumerate(history):
        where = slice(2 * k + 1 if k else 0, 2 * k + 3)
        drawn = sum(step["tokens_by_source"]["math"] for step in steps[where]) / sum(
            step["tokens"] for step in steps[where]
        )
        assert drawn == pytest.approx(shares["math"], abs=0.1)


GRAD_NORM = {
    "losses": [{"name": "forward_kl"}, {"name": "cross_entropy", "weight": 0.5}],
    "balance": {"kind": "grad_norm", "every_steps": 2},
}


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        pytest.param(
            SAMPLING,
            ["train_step.after_write@2", "train_step.after_write@5", "checkpoint.before_marker@1"],
            id="sampling",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {**SAMPLING, **GRAD_NORM}, ["train_step.after_write@8"], id="sampling-grad-norm", marks=pytest.mark.slow
        ),
        pytest.param(
            {"balance": "uncertainty", "evaluate": {"every_steps": 4}},
            ["train_step.after_write@5"],
            id="uncertainty",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_course_resumes_bitwise_equal_after_kills(recipe_of, run_apart, settings, places):
    recipe = recipe_of(**settings, trainer={"max_steps": 10, "gradient_accumulation_steps": 2})
    assert run_apart(elsewhere(recipe, "whole"), None) == 0
    for place in places:
        assert run_apart(recipe, place) == -signal.SIGKILL
    assert run_apart(recipe, None) == 0
    assert outcome(recipe) == outcome(elsewhere(recipe, "whole"))


@pytest.mark.slow
def test_checkpoint_without_the_shares_so_far_is_refused(recipe_of):
    recipe = recipe_of(**SAMPLING, trainer={"max_steps": 3})
    run_stages(recipe)
    (directory(recipe) / "done.json").unlink()
    (checkpoint,) = list_checkpoints(directory(recipe))
    (checkpoint.path / "course.json").unlink()
    with pytest.raises(TrainingError, match=r"course\.json cannot be read"):
        run_stages(recipe)


def test_source_without_held_out_rows_cannot_be_sampled_by_evaluation(recipe_of, tiny):
    settings = {"evaluate": {"every_steps": 2}, "sampling": {"kind": "evaluation"}}
    recipe = recipe_of(**settings, cache=[tiny.cache, tiny.drawn], losses=[{"name": "cross_entropy"}])
    few = Recipe.model_validate({**recipe.model_dump(mode="json"), "heldout": {"fraction": 0.02}})
    with pytest.raises(TrainingError, match=r"source '\w+' has no held-out row"):
        resolve_stage(few, few.stages[0])


@pytest.mark.slow
def test_gradient_norms_balance_the_losses_of_a_stage(recipe_of):
    losses = [{"name": "forward_kl", "weight": 1.0}, {"name": "cross_entropy", "weight": 0.5}]
    balance = {"kind": "grad_norm", "every_steps": 1, "alpha": 0.0, "learning_rate": 0.2}
    recipe = recipe_of(losses=losses, balance=balance, trainer={"max_steps": 12, "learning_rate": 1e-4})
    run_stages(recipe)
    steps = steps_of(recipe)
    assert steps[0]["weights"] == {"forward_kl": 1.0, "cross_entropy": 0.5}

    def imbalance(step):
        kl = step["gradient_norms"]["forward_kl"] * step["weights"]["forward_kl"]
        return abs(math.log(kl / (step["gradient_norms"]["cross_entropy"] * step["weights"]["cross_entropy"] / 0.5)))

    assert imbalance(steps[-1]) < 0.5 * imbalance(steps[0])
    for step in steps:
        assert step["weights"]["forward_kl"] + step["weights"]["cross_entropy"] / 0.5 == pytest.approx(2)
        assert step["loss"] == pytest.approx(
            sum(step["weights"][name] * step["terms"][name] for name in step["terms"]), rel=1e-5
        )


@pytest.mark.slow
def test_learned_variances_weigh_the_losses_of_a_stage(recipe_of):
    recipe = recipe_of(balance={"kind": "uncertainty", "learning_rate": 0.05}, trainer={"max_steps": 8})
    run_stages(recipe)
    variances = {"forward_kl": 0.0, "cross_entropy": 0.0}
    weights = {"forward_kl": 0.9, "cross_entropy": 0.1}
    for step in steps_of(recipe):
        for name in variances:
            assert step["weights"][name] == pytest.approx(weights[name] * math.exp(-variances[name]), rel=1e-9)
            slope = 1 - math.exp(-variances[name]) * step["terms"][name]
            variances[name] -= 0.05 * min(max(slope, -1), 1)
            assert step["log_variances"][name] == pytest.approx(variances[name], rel=1e-9)
    assert variances["cross_entropy"] > 0.3, "a loss of 6 nats is weighed down"


def test_balance_that_cannot_be_honoured_is_refused(recipe_of):
    with pytest.raises(ValueError, match="nothing to balance it against"):
        recipe_of(losses=[{"name": "forward_kl"}], balance="grad_norm")
    with pytest.raises(ValueError, match="'uncertainty' does not use it"):
        recipe_of(balance={"kind": "uncertainty", "alpha": 1.0})
    with pytest.raises(ValueError, match="'fixed' does not use it"):
        recipe_of(balance={"learning_rate": 1.0})


@pytest.mark.slow
def test_stage_starts_from_another_runs_stage_however_it_is_named(recipe_of, capfd):
    first = elsewhere(recipe_of(name="sft", trainer={"max_steps": 1}), "other")
    run_stages(first)
    run = first.output_dir
    names = [f"{run}:sft", f"{run}/train/sft", f"{run}/train/sft/model", str(run)]
    works = [resolve_stage(recipe, recipe.stages[0]) for recipe in (recipe_of(init_from=name) for name in names)]
    assert [work.start for work in works] == [run / "train/sft/model"] * 4
    recipe = recipe_of(init_from=f"{run}:sft", trainer={"max_steps": 1})
    run_stages(recipe)
    assert f"started from {run}/train/sft/model" in capfd.readouterr().err
    from_base = elsewhere(recipe_of(trainer={"max_steps": 1}), "base")
    run_stages(from_base)
    assert steps_of(recipe)[0]["loss"] != steps_of(from_base)[0]["loss"]


def test_start_that_is_no_finished_stage_is_refused(recipe_of, tmp_path):
    for name in ("a", "b"):
        model = tmp_path / "two/train" / name / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    for start, said in (
        (f"{tmp_path}/two", r"does not say which of its stages \(finished: a, b\)"),
        (f"{tmp_path}/two:c", r"has no finished stage 'c' \(finished: a, b\)"),
        (f"{tmp_path}", "holds no config.json"),
    ):
        recipe = recipe_of(init_from=start)
        with pytest.raises(TrainingError, match=said):
            resolve_stage(recipe, recipe.stages[0])
    with pytest.raises(ValueError, match="there is no directory"):
        recipe_of(init_from=f"{tmp_path}/nowhere:a")
