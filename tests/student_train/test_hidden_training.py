"""Training with losses on a hidden layer, from the teacher to the exported student: losses fall, a kill changes no
byte.
"""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from shared.cache.cache import Cache
from shared.errors import CacheError, RecipeError, TrainingError
from shared.recipe.file import dump_recipe, load_recipe
from shared.recipe.recipe import Loss, Recipe
from student_train.layers.projections import FILE
from student_train.records.metrics_log import read_steps
from student_train.stage.stages import run_stages
from teacher_cache.build import teach
from tests.student_train.hidden_caches import add_hidden
from tests.student_train.test_several_processes import assert_same_training, train_with_two
from tests.student_train.tiny_caches import make_cache
from tests.tiny_models import make_qwen3
from tools.evaluate.heldout.heldout import evaluate_heldout
from tools.plan.planner import plan

ALL_THREE = [
    {"name": "forward_kl"},
    {"name": "hidden", "weight": {"kind": "linear", "start": 1.0, "end": 0.5}},
    {"name": "attention", "weight": 1.0},
    {"name": "contrastive", "weight": 0.2, "tau": 0.2},
]
CAPTURE = {"layers": [1, "final"], "projection": 24, "pooled": "mean", "attention": {"layers": 1, "strongest": 4}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("hidden")
    teacher = make_qwen3(root / "teacher", seed=1)
    return add_hidden(make_cache(root / "cache", teacher), teacher, **CAPTURE)


@pytest.mark.slow
def test_from_teacher_to_student_with_every_loss_on_a_hidden_layer(tmp_path):
    teacher, student = (
        make_qwen3(tmp_path / "teacher", seed=1),
        make_qwen3(tmp_path / "student", seed=2, spread=0.05, hidden_size=32),
    )
    talk = [
        {"text": f"{name} has {n} apples, {n + 1} servers and {2 * n} disks on node {n}."}
        for n in range(40)
        for name in "AB"
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    recipe = Recipe.model_validate(
        {
            "name": "inside",
            "output_dir": str(tmp_path / "run"),
            "teacher": {"model": str(teacher), "engine": "transformers", "dtype": "float32"},
            "prompts": [{"source": "talk", "path": str(tmp_path / "text.jsonl"), "format": "text"}],
            "capture": {"k": 8, "hidden": {**CAPTURE, "projection": None}},
            "cache": str(tmp_path / "cache"),
            "heldout": {"fraction": 0.2},
            "student": {"model": str(student)},
            "stages": [
                {
                    "name": "inside",
                    "losses": ALL_THREE,
                    "trainer": {"learning_rate": 5e-3, "max_steps": 24, "pack_tokens": 256, "report_to": "none"},
                }
            ],
        }
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    planned = plan(recipe)["hidden"]["bytes"]["at_most"]
    summary = teach(recipe)
    assert summary.hidden.rows == 80
    records = (tmp_path / "cache/hidden").rglob("part-*.json")
    assert 0.7 * planned < sum(json.loads(path.read_text())["stats"]["blob_bytes"] for path in records) <= planned
    run_stages(recipe)
    steps = read_steps(tmp_path / "run/train/inside/metrics.jsonl")
    for name in ("hidden", "attention", "contrastive", "forward_kl"):
        first, last = (sum(step["terms"][name] for step in part) / 4 for part in (steps[:4], steps[-4:]))
        assert last < 0.9 * first, name
    weights = {0: 1.0, 23: 0.5}
    for step, weight in weights.items():
        terms = steps[step]["terms"]
        loss = terms["forward_kl"] + weight * terms["hidden"] + terms["attention"] + 0.2 * terms["contrastive"]
        assert steps[step]["loss"] == pytest.approx(loss, rel=1e-4)
    exported = load_file(tmp_path / "run/train/inside/model/model.safetensors")
    original = load_file(student / "model.safetensors")
    assert exported.keys() == original.keys()
    figures = [evaluate_heldout(path, recipe.cache, 0.2) for path in (student, tmp_path / "run/train/inside/model")]
    assert figures[1]["kl_nats"] < figures[0]["kl_nats"]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", {"kind": "lora", "r": 4}])
def test_kill_changes_no_byte_of_student_or_projections(recipe_of, run_apart, cache, adapter):
    settings = {"losses": ALL_THREE[1:], "student": {"adapter": adapter, "gradient_checkpointing": True}}
    recipe = recipe_of(cache=[cache], trainer={"gradient_accumulation_steps": 2}, **settings)
    whole = recipe.model_copy(update={"output_dir": recipe.output_dir.with_name("whole")})
    assert run_apart(whole) == 0
    assert run_apart(recipe, "train_step.after_write@5") == -signal.SIGKILL
    assert run_apart(recipe) == 0
    stages = [path.output_dir / "train/kd" for path in (whole, recipe)]
    for name in ("metrics.jsonl", "model/model.safetensors", f"checkpoint-6/{FILE}"):
        assert (stages[0] / name).read_bytes() == (stages[1] / name).read_bytes()
    projections = [load_file(stages[0] / f"checkpoint-{step}" / FILE) for step in (3, 6)]
    assert set(projections[0]) == {
        "teacher_1_student_1.weight",
        "teacher_final_student_final.weight",
        "pooled.weight",
    }
    assert all(not torch.equal(projections[0][name], projections[1][name]) for name in projections[0])
    saved = load_file(next(path for path in (stages[0] / "checkpoint-3").glob("*model.safetensors")))
    assert not any("projections" in name for name in saved)


@pytest.mark.slow
def test_gradient_norms_balance_head_and_hidden_layers_and_a_resumed_run_changes_no_byte(recipe_of, cache):
    balance = {"kind": "grad_norm", "every_steps": 2, "alpha": 0.0, "learning_rate": 0.2}
    student = {"adapter": {"kind": "lora", "r": 4, "dropout": 0.1}, "gradient_checkpointing": True}
    losses = [{"name": loss["name"]} for loss in ALL_THREE]
    recipe = recipe_of(
        cache=[cache], losses=losses, balance=balance, student=student, trainer={"gradient_accumulation_steps": 2}
    )
    directory = recipe.output_dir / "train/kd"
    names = ("metrics.jsonl", "model/model.safetensors", "checkpoint-6/course.json", f"checkpoint-6/{FILE}")
    run_stages(recipe)
    whole = [(directory / name).read_bytes() for name in names]
    (directory / "done.json").unlink()
    for name in ("model", "checkpoint-6"):
        shutil.rmtree(directory / name)
    run_stages(recipe)
    assert [(directory / name).read_bytes() for name in names] == whole
    steps = read_steps(directory / "metrics.jsonl")
    assert [step["step"] for step in steps if "gradient_norms" in step] == [1, 3, 5]
    for step, following in zip(steps[::2], steps[1::2], strict=True):
        norms = step["gradient_norms"]
        assert set(norms) == {loss["name"] for loss in ALL_THREE}
        before, after = ([weights["weights"][name] * norms[name] for name in norms] for weights in (step, following))
        assert max(after) / min(after) < 0.99 * max(before) / min(before)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_two_processes_train_the_same_projections_as_one(recipe_of, cache, adapter):
    """Clipping is always active, so that a norm without the projections would show; contrastive sees other negatives
    there.
    """
    common = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "save_steps": 3, "max_grad_norm": 0.1}
    settings = {"cache": [cache], "losses": ALL_THREE[1:3], "student": {"adapter": adapter}}
    alone = recipe_of(trainer={**common, "per_device_train_batch_size": 4}, **settings)
    alone = alone.model_copy(update={"output_dir": alone.output_dir.with_name("alone")})
    run_stages(alone)
    together = recipe_of(trainer={**common, "gradient_accumulation_steps": 2}, **settings)
    assert train_with_two(together) == [0, 0]
    assert_same_training(alone, together)
    saved = [load_file(recipe.output_dir / "train/kd/checkpoint-3" / FILE) for recipe in (alone, together)]
    for name, weight in saved[0].items():
        torch.testing.assert_close(weight, saved[1][name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_stage_in_bfloat16_is_evaluated_while_it_trains(recipe_of, cache):
    evaluate = {"every_steps": 2, "rows_per_source": 2, "samples": 1, "sample_tokens": 3}
    recipe = recipe_of(cache=[cache], losses=ALL_THREE[1:], evaluate=evaluate, trainer={"max_steps": 4, "bf16": True})
    run_stages(recipe)
    directory = recipe.output_dir / "train/kd"
    steps = read_steps(directory / "metrics.jsonl")
    assert [step["step"] for step in read_steps(directory / "evaluations.jsonl")] == [0, 2, 4]
    assert all(0 < step["terms"]["attention"] < 5 and 0 < step["terms"]["hidden"] < 50 for step in steps)


@pytest.mark.slow
def test_checkpoint_without_its_projections_is_refused(recipe_of, cache):
    recipe = recipe_of(cache=[cache], losses=ALL_THREE[1:2], trainer={"max_steps": 2, "save_steps": 2})
    run_stages(recipe)
    directory = recipe.output_dir / "train/kd"
    (directory / "done.json").unlink()
    (directory / "checkpoint-2" / FILE).unlink()
    with pytest.raises(TrainingError, match=r"projections\.safetensors cannot be read"):
        run_stages(recipe)


def test_stage_needs_a_hidden_layer_and_says_how_to_get_one(recipe_of, tiny, cache):
    with pytest.raises(CacheError, match="has no hidden layer; add"):
        run_stages(recipe_of(losses=ALL_THREE[1:2]))
    with pytest.raises(TrainingError, match="does not allow"):
        run_stages(recipe_of(cache=[cache], losses=ALL_THREE[1:2], trainer={"torch_compile": True}))
    with pytest.raises(TrainingError, match="cannot see through"):
        run_stages(recipe_of(cache=[cache], losses=ALL_THREE[2:3], student={"attention": "eager"}))


@pytest.mark.slow
def test_recipes_own_hidden_layer_is_chosen_among_several(recipe_of, cache, tmp_path):
    from shared.cache.layer_choice import hidden_layer_of

    recipe = recipe_of(cache=[cache], losses=ALL_THREE[1:2], trainer={"max_steps": 1})
    teacher = cache.parent / "teacher"
    add_hidden(cache, teacher, layers=[2])
    with pytest.raises(CacheError, match="has 2 hidden layers"):
        run_stages(recipe)
    captured = Recipe.model_validate({**recipe.model_dump(mode="json"), "capture": {"hidden": {"layers": [2]}}})
    assert Cache.open(cache, hidden=hidden_layer_of(captured, cache)).hidden_layer.layers == (2,)
    run_stages(captured)
    named = recipe_of(
        cache=[cache],
        losses=ALL_THREE[1:2],
        trainer={"max_steps": 1},
        hidden=Cache.open(cache, hidden="layers1").hidden_name,
        name="other",
    )
    run_stages(named)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({"name": "hidden", "temperature": 2.0}, "have `temperature`, 'hidden' does not"),
        ({"name": "contrastive", "temperature": 0.1}, "'contrastive' does not"),
        ({"name": "forward_kl", "tau": 0.5}, "only 'alm', 'contrastive' have `tau`"),
        ({"name": "attention", "metric": "cosine"}, "only 'hidden' has `metric`"),
        ({"name": "hidden", "metric": "cosine", "normalise": False}, "a cosine does not see lengths"),
        ({"name": "contrastive", "layer_map": {"1": 1}}, "only 'hidden', 'attention' have `layer_map`"),
        ({"name": "attention", "layer_map": {"final": 1}}, "'final' is no layer of a teacher"),
        ({"name": "attention", "layer_map": {"1": "final"}}, "'final' is a state and has no attention"),
        ({"name": "hidden", "layer_map": {"0": 1}}, "'0' is no layer of a teacher"),
        ({"name": "hidden", "layer_map": {}}, "maps no layer"),
        ({"name": "hidden", "beta": 0.3}, "only 'jsd' has `beta`"),
    ],
)
def test_option_without_a_meaning_is_refused(loss, said):
    with pytest.raises(ValueError, match=said):
        TypeAdapter(Loss).validate_python(loss)


def test_stage_refuses_a_loss_twice_and_a_layer_that_nothing_reads(recipe_of, tmp_path):
    twice = [{"name": "hidden"}, {"name": "hidden", "metric": "cosine"}]
    with pytest.raises(ValueError, match="'hidden' is listed twice"):
        recipe_of(losses=twice)
    with pytest.raises(ValueError, match="no loss of the stage reads a hidden layer"):
        recipe_of(hidden="layers1")


def test_layer_map_is_written_with_numbers_in_yaml(recipe_of, tmp_path):
    losses = [{"name": "hidden", "layer_map": {"1": 2, "final": "final"}}]
    text = dump_recipe(recipe_of(losses=losses))
    text = text.replace("'1': 2", "1: 2").replace('"1": 2', "1: 2")
    assert "1: 2" in text
    (tmp_path / "recipe.yaml").write_text(text)
    try:
        loaded = load_recipe(tmp_path / "recipe.yaml")
    except RecipeError as error:
        pytest.fail(str(error))
    assert loaded.stages[0].losses[0].layer_map == {"1": 2, "final": "final"}
