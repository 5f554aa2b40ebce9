"""Every setting of a student and its stages has its test: it changes what it says, or it is refused.

`SHOWN` holds, for each field, either a demonstration made here or the name of the test that makes it (which must
exist). A field that is added to the recipe without an entry fails.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from shared.errors import TrainingError
from shared.recipe.recipe import Adapter, Stage, StageTrainer, Student
from shared.recipe.sections.losses import LOSSES, names_of
from shared.recipe.sections.target_layers import TargetLayer
from student_train.batch.dataset import CacheList
from student_train.batch.stage_terms import terms_at
from student_train.losses import divergences, registry
from student_train.stage.stage_identity import stage_identity
from student_train.stage.stage_run import _student, arguments_of
from student_train.stage.stage_work import resolve_stage
from student_train.student.decoder_layers import decoder_layers
from student_train.student.student import add_adapter, load_student

HERE = Path(__file__).parent
CLASSES = (Stage, TargetLayer, StageTrainer, Student, Adapter, *LOSSES)


class World:
    """What demonstrations stand on: tiny models and caches, and recipes made of settings."""

    def __init__(self, recipe_of, tiny, monkeypatch):
        self.recipe_of, self.tiny, self.monkeypatch = recipe_of, tiny, monkeypatch

    def work(self, *, student=None, trainer=None, **stage):
        recipe = self.recipe_of(student=student, trainer=trainer, **stage)
        return resolve_stage(recipe, recipe.stages[0])

    def arguments(self, **trainer):
        return arguments_of(self.work(trainer=trainer))

    def adapted(self, **adapter):
        caches = CacheList.open([self.tiny.cache], None)
        student = Student.model_validate({"model": str(self.tiny.qwen3), "adapter": {"kind": "lora", **adapter}})
        return add_adapter(load_student(student, None, caches), student.adapter)

    def terms(self, *losses):
        return terms_at(self.recipe_of(losses=list(losses)).stages[0], 0, 4)


def argument(name, value, given=None):
    """Show that the field becomes the argument of that name of transformers.Trainer."""

    def show(world):
        assert getattr(StageTrainer(), name) != value, "the default would show nothing"
        assert getattr(world.arguments(**{name: value if given is None else given}), name) == value

    return show


def plan(attribute, *, trainer=None, **stage):
    """Show that the field changes the plan of the stage's packs."""

    def show(world):
        before, after = world.work(), world.work(trainer=trainer, **stage)
        assert getattr(before.plan, attribute) != getattr(after.plan, attribute)
        assert before.plan.hash != after.plan.hash

    return show


def loaded_with(name, **student):
    """Show that the field reaches whatever loads the student."""

    def show(world):
        from transformers import AutoModelForCausalLM

        seen = []
        original = AutoModelForCausalLM.from_pretrained

        def spy(*args, **settings):
            seen.append(settings[name])
            return original(*args, **{**settings, "revision": None, "trust_remote_code": False})

        world.monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
        _load(world, **student)
        assert seen == [student[name]]

    return show


def _load(world, **settings):
    caches = CacheList.open([world.tiny.cache], None)
    return load_student(Student.model_validate({"model": str(world.tiny.qwen3), **settings}), None, caches)


def shows_warmup_ratio(world):
    assert world.arguments(warmup_ratio=0.5, max_steps=9).warmup_steps == 5


def shows_learning_rate_options(world):
    options = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}}
    assert world.arguments(**options).lr_scheduler_kwargs == {"min_lr": 1e-4}


def shows_compiled_body(world):
    for wanted in (True, False):
        work = world.work(trainer={"torch_compile": wanted})
        base = load_student(work.student, None, work.caches)
        _student(work, arguments_of(work), base)
        layers = decoder_layers(base, "torch_compile")
        assert {layer._compiled_call_impl is not None for layer in layers} == {wanted}


def shows_wandb_and_none(world):
    assert world.arguments(report_to="none").report_to == []


def shows_eager_attention(world):
    assert _load(world, attention="eager").config._attn_implementation == "eager"
    assert _load(world).config._attn_implementation == "sdpa"


def shows_type_of_weights(world):
    assert {parameter.dtype for parameter in _load(world, dtype="bfloat16").parameters()} == {torch.bfloat16}


def shows_rank(world):
    weights = {name: parameter for name, parameter in world.adapted(r=3).named_parameters() if "lora_A" in name}
    assert {weight.shape[0] for weight in weights.values()} == {3}


def shows_scale_of_additions(world):
    layers = [
        module
        for module in world.adapted(r=4, alpha=20).modules()
        if isinstance(getattr(module, "scaling", None), dict)
    ]
    assert {layer.scaling["default"] for layer in layers} == {5.0}


def shows_dropout(world):
    layers = [module for module in world.adapted(dropout=0.25).modules() if hasattr(module, "lora_dropout")]
    assert {layer.lora_dropout["default"].p for layer in layers} == {0.25}


def shows_target_modules(world):
    names = {
        name.split(".lora_A")[0]
        for name, _ in world.adapted(target_modules=["q_proj"]).named_parameters()
        if "lora_A" in name
    }
    assert {name.rsplit(".", 1)[-1] for name in names} == {"q_proj"}


def shows_option_of_loss(name, option):
    def show(world):
        values = []
        for value in (0.2, 0.7):
            (term,) = world.terms({"name": name, option: value})
            assert term.options[option] == value
            log_p, log_q = (
                torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64).log()[i : i + 1] for i in (0, 1)
            )
            values.append(float(registry[name].function(log_p, log_q, **term.options)))
        assert values[0] != pytest.approx(values[1], rel=1e-3)

    return show


def shows_option_of_hidden(option, choices):
    def show(world):
        states = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[1.0, 5.0, 2.0]])
        values = []
        for choice in choices:
            (term,) = world.terms({"name": "hidden", option: choice})
            values.append(float(registry["hidden"].function(*states, **term.options)))
        assert values[0] != pytest.approx(values[1], rel=1e-3)

    return show


def shows_name_of_stage(world):
    assert world.work(name="other").directory == world.work().directory.with_name("other")


def shows_layer_by_name(world):
    from shared.errors import CacheError

    (name,) = world.work().caches.caches[0].layers()
    assert world.work(targets=name).caches.caches[0].layer is not None
    with pytest.raises(CacheError, match="nowhere"):
        world.work(targets="nowhere")


def shows_too_long(world):
    cut, dropped = (world.work(max_length=44, too_long=how).plan for how in ("cut", "drop"))
    assert sum(epoch.num_cut for epoch in cut.epochs) > 0
    assert sum(epoch.num_dropped for epoch in dropped.epochs) > 0
    with pytest.raises(TrainingError, match="44"):
        world.work(max_length=44, too_long="refuse")


def shows_directory_of_model(world):
    assert (
        stage_identity(world.work(student={"model": str(world.tiny.qwen3)}))["start"]
        != stage_identity(world.work(student={"model": str(world.tiny.llama)}))["start"]
    )


SHOWN = {
    Stage: {
        "name": shows_name_of_stage,
        "init_from": "test_students.py::test_next_stage_starts_from_the_merged_model",
        "losses": "test_training_steps.py::test_first_step_equals_dense_float64_on_rows_alone",
        "mixture": plan("hash", mixture={"math": 0.9, "ops": 0.1}),
        "balance": "test_stage_schedule.py::test_gradient_norms_balance_the_losses_of_a_stage",
        "sampling": "test_stage_schedule.py::test_shares_follow_the_evaluations_and_the_steps_follow_the_shares",
        "targets": shows_layer_by_name,
        "window_parts": "test_windows.py::test_a_window_reads_only_its_parts_and_the_epoch_draws_the_same_rows",
        "hidden": "test_hidden_training.py::test_recipes_own_hidden_layer_is_chosen_among_several",
        "max_length": plan("limit", max_length=40),
        "too_long": shows_too_long,
        "evaluate": "test_evaluation.py::test_figures_equal_those_of_the_evaluation_of_the_saved_model",
        "rounds": "../tools/rounds/test_rounds.py::test_training_tokens_are_divided_as_the_recipe_says",
        "trainer": "test_every_setting.py::test_setting_changes_what_it_says",
    },
    StageTrainer: {
        "learning_rate": argument("learning_rate", 0.125),
        "max_steps": plan("num_steps", trainer={"max_steps": 4}),
        "num_train_epochs": plan("num_packs", trainer={"max_steps": None, "num_train_epochs": 3.0}),
        "pack_tokens": plan("limit", trainer={"pack_tokens": 128}),
        "per_device_train_batch_size": argument("per_device_train_batch_size", 3),
        "gradient_accumulation_steps": argument("gradient_accumulation_steps", 3),
        "lr_scheduler_type": argument("lr_scheduler_type", "linear"),
        "lr_scheduler_kwargs": shows_learning_rate_options,
        "warmup_steps": argument("warmup_steps", 3),
        "warmup_ratio": shows_warmup_ratio,
        "weight_decay": argument("weight_decay", 0.25),
        "adam_beta1": argument("adam_beta1", 0.5),
        "adam_beta2": argument("adam_beta2", 0.5),
        "adam_epsilon": argument("adam_epsilon", 1e-3),
        "max_grad_norm": argument("max_grad_norm", 0.5),
        "max_grad_norm_factor": "test_divergence_stops.py::"
        "test_exploding_gradients_stop_with_the_newest_state_from_before",
        "optim": argument("optim", "sgd"),
        "rounding": "test_rounding.py::test_updates_are_lost_to_nearest_rounding_and_kept_by_chance",
        "bf16": argument("bf16", True),
        "fp16": "test_training_steps.py::test_setting_that_cannot_be_honoured_is_refused_in_a_sentence",
        "tf32": "test_training_steps.py::test_setting_that_cannot_be_honoured_is_refused_in_a_sentence",
        "torch_compile": shows_compiled_body,
        "gradient_checkpointing": argument("gradient_checkpointing", True),
        "fsdp": "test_several_processes.py::test_two_processes_equal_one_of_the_same_global_batch",
        "operator": "test_operator_choice.py::test_recipe_setting_reaches_the_loss",
        "operator_chunk_mib": "test_operator_choice.py::test_recipe_setting_reaches_the_loss",
        "save_steps": argument("save_steps", 7),
        "save_total_limit": "test_resume.py::test_checkpoints_are_rotated_and_hold_no_pickled_arguments",
        "logging_steps": argument("logging_steps", 7),
        "dataloader_num_workers": argument("dataloader_num_workers", 2),
        "report_to": shows_wandb_and_none,
        "seed": plan("seed", trainer={"seed": 5}),
    },
    TargetLayer: {
        "layer": "test_taught_stages.py::test_a_pack_holds_what_each_teacher_says_of_its_rows",
        "weight": "test_taught_stages.py::test_weights_of_teachers_multiply_those_of_losses_and_may_move",
        "sources": "test_taught_stages.py::test_a_pack_holds_what_each_teacher_says_of_its_rows",
    },
    Student: {
        "model": shows_directory_of_model,
        "init": "test_students.py::test_random_weights_depend_on_the_seed_alone_and_have_no_padding",
        "revision": loaded_with("revision", revision="v2"),
        "dtype": shows_type_of_weights,
        "adapter": "test_students.py::test_adapter_is_merged_into_the_model_and_kept_beside_it",
        "attention": shows_eager_attention,
        "trust_remote_code": loaded_with("trust_remote_code", trust_remote_code=True),
        "gradient_checkpointing": "test_students.py::test_recomputed_activations_change_nothing",
        "liger": "test_card_settings.py::"
        "test_liger_replaces_norm_mlp_and_rotary_but_no_loss_and_leaves_transformers_as_it_was",
    },
    Adapter: {
        "kind": "test_card_settings.py::test_four_bit_student_trains_its_adapter_alone_and_exports_the_unquantised_sum",
        "r": shows_rank,
        "alpha": shows_scale_of_additions,
        "dropout": shows_dropout,
        "target_modules": shows_target_modules,
    },
    **{
        kind: {
            "name": "test_losses.py::test_value_is_the_definition_on_probabilities",
            "weight": "test_training_steps.py::test_schedules_and_exact_values_reach_the_step_log",
            "temperature": "test_training_steps.py::test_schedules_and_exact_values_reach_the_step_log",
            **{
                option: shows_option_of_loss(name, option)
                for name in names_of(kind)
                if name in divergences
                for option in divergences[name].options
            },
            "tail_weight": "test_fused_loss.py::test_value_and_gradients_equal_dense_autograd",
            "weigh": "test_fused_loss.py::test_weights_by_the_teachers_entropy_equal_dense_autograd",
            "metric": shows_option_of_hidden("metric", ("mse", "cosine")),
            "normalise": shows_option_of_hidden("normalise", (True, False)),
            "layer_map": "test_layer_losses.py::test_values_and_gradients_through_a_pack_are_those_of_rows_alone",
            "tau": "test_layer_losses.py::test_values_and_gradients_through_a_pack_are_those_of_rows_alone",
        }
        for kind in LOSSES
    },
}
EVERY = [(section, name) for section in CLASSES for name in section.model_fields]


@pytest.mark.parametrize(("section", "name"), EVERY, ids=[f"{section.__name__}.{name}" for section, name in EVERY])
def test_setting_changes_what_it_says(section, name, recipe_of, tiny, monkeypatch):
    shown = SHOWN[section].get(name)
    assert shown is not None, f"{section.__name__}.{name} has no test that it changes what it says; add one to SHOWN"
    if isinstance(shown, str):
        file, test = shown.split("::")
        assert re.search(rf"^def {test}\(", (HERE / file).read_text(), re.MULTILINE), f"{shown} does not exist"
    else:
        shown(World(recipe_of, tiny, monkeypatch))


def test_table_has_no_entry_for_what_is_no_setting():
    for section, entries in SHOWN.items():
        known = {name for kind in LOSSES for name in kind.model_fields} if section in LOSSES else section.model_fields
        assert set(entries) <= set(known)
