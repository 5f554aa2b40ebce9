"""What a recipe may say: every section's own rules and the rules between sections, met through plain data."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from shared.recipe.file import dump_recipe
from shared.recipe.recipe import Capture, Loss, Recipe, StageTrainer, Task
from shared.recipe.sections.capture import SampleCapture, TopCapture
from shared.recipe.sections.teacher import InProcess, address_problem, engine_of_student, on_engine
from shared.schema import MAX_K

ON_TRANSFORMERS = {"models": ["kd"], "engine": "transformers"}
KL = {"name": "forward_kl"}
REFERENCE = {"model": "t", "engine": "transformers"}
SERVED = {"model": "t", "engine": "server", "servers": ["http://a:8000/v1"]}


def recipe(**changes):
    """The smallest recipe that does everything, changed."""
    data = {
        "name": "x",
        "output_dir": "runs/x",
        "teacher": {"model": "t"},
        "prompts": [{"source": "a", "path": "a.jsonl", "format": "messages"}],
        "generate": {},
        "cache": "runs/x/cache",
        "student": {"model": "s"},
        "stages": [{"name": "sft", "losses": [{"name": "cross_entropy"}]}, {"name": "kd", "losses": [KL]}],
    }
    return {key: value for key, value in {**data, **changes}.items() if value is not None}


def refused(section, data) -> str:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(section).validate_python(data)
    return str(caught.value)


def test_smallest_recipe_only_needs_name_output_and_cache():
    small = Recipe.model_validate({"name": "x", "output_dir": "o", "cache": "c"})
    assert (small.cache, small.teacher, small.stages, small.rows_per_part) == ((Path("c"),), None, (), 1024)


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        ({"path": "s3://bucket/demo", "format": "cache"}, "decant cache pull URL DIRECTORY"),
        ({"path": "https://host/a.jsonl?key=secret", "format": "messages", "source": "a"}, "download it"),
    ],
)
def test_prompts_behind_a_url_are_refused_with_a_way_to_them(source, advice):
    changes = {"generate": None} if source["format"] == "cache" else {}
    said = refused(Recipe, recipe(prompts=[source], **changes))
    assert "this is a URL" in said
    assert advice in said


def test_a_run_is_not_written_to_a_url():
    assert "name a directory" in refused(Recipe, recipe(output_dir="s3://bucket/run"))


def test_recipe_cannot_be_changed_after_validation():
    whole = Recipe.model_validate(recipe())
    with pytest.raises(ValidationError):
        whole.seed = 3


@pytest.mark.parametrize(
    "mode, given, needed",
    [
        ("top", {"k": 0}, "greater than or equal to 1"),
        ("top", {"k": MAX_K, "label": "head"}, "leaves no room"),
        ("sample", {}, "draws"),
        ("top+sample", {"k": 8}, "draws"),
        ("top+sample", {"k": 0, "draws": 2}, "greater than or equal to 1"),
        ("tops", {}, "'tops' is not one of 'top', 'sample', 'top+sample'; did you mean 'top'?"),
        ("top", {"draws": 4}, "only 'sample', 'top+sample' have `draws`, 'top' does not, so leave it out"),
        ("top", {"draws": 0}, "only 'sample', 'top+sample' have `draws`, 'top' does not, so leave it out"),
        ("sample", {"draws": 4, "k": 8}, "only 'top', 'top+sample' have `k`, 'sample' does not, so leave it out"),
        ("sample", {"draws": 4, "k": 0}, "only 'top', 'top+sample' have `k`, 'sample' does not, so leave it out"),
        ("sample", {"draws": 4, "mass": 1.0}, "have `mass`, 'sample' does not"),
        ("sample", {"draws": 4, "label": "apart"}, "have `label`, 'sample' does not"),
    ],
)
def test_capture_mode_without_what_it_needs_is_refused(mode, given, needed):
    assert needed in refused(Capture, {"mode": mode, **given})


FIRST_WRITTEN = {
    "capture": {"k": 64, "draws": 0, "mass": 1.0, "temperatures": [1.0], "gap_step": 0.0625, "hidden": None},
    "teacher": {
        "model": "t",
        "revision": None,
        "dtype": "bfloat16",
        "quantization": None,
        "adapter": None,
        "tensor_parallel_size": 1,
        "max_model_len": None,
        "gpu_memory_utilization": 0.85,
        "workers": None,
        "max_num_batched_tokens": 8192,
        "head_dtype": "float32",
        "trust_remote_code": False,
        "servers": [],
        "server_requests": 64,
        "server_patience_seconds": 600.0,
        "batch_tokens": 4096,
    },
}
"""Sections with every option of every kind, as the first version wrote them out."""


@pytest.mark.parametrize(
    "key, own, foreign",
    [
        ("capture", {"mode": "top"}, {"draws": 3}),
        ("capture", {"mode": "sample", "k": 0, "draws": 3}, {"mass": 0.9}),
        ("capture", {"mode": "sample", "k": 0, "draws": 3, "label": "apart"}, {"label": "head"}),
        ("capture", {"mode": "top+sample", "draws": 3, "label": "head"}, {}),
        ("teacher", {"engine": "vllm"}, {"server_requests": 3}),
        ("teacher", {"engine": "transformers"}, {"quantization": "fp8"}),
        ("teacher", {"engine": "server", "servers": ["http://a/v1"]}, {"gpu_memory_utilization": 0.5}),
    ],
)
def test_section_that_an_earlier_version_wrote_out_is_read_and_nothing_else_at_defaults(key, own, foreign):
    dump = {**FIRST_WRITTEN[key], **own}
    loaded = Recipe.model_validate(recipe(**{key: dump}))
    section = getattr(loaded, key).model_dump(mode="json")
    assert section.items() <= {"label": "apart", **dump}.items()
    assert own.keys() - {"k", "label"} <= section.keys()
    assert Recipe.model_validate(loaded.model_dump(mode="json")) == loaded
    if foreign:
        assert "so leave it out" in refused(Recipe, recipe(**{key: {**dump, **foreign}}))
        assert "so leave it out" in refused(Recipe, recipe(**{key: {**own, **{name: dump[name] for name in foreign}}}))
    assert "nobody" in refused(Recipe, recipe(**{key: {**dump, "nobody": 1}}))


@pytest.mark.parametrize("key", ["capture", "teacher"])
def test_dump_without_its_empty_options_is_one_too(key):
    dump = {name: value for name, value in FIRST_WRITTEN[key].items() if value is not None}
    own = {"mode": "top"} if key == "capture" else {"engine": "transformers"}
    assert Recipe.model_validate(recipe(**{key: {**dump, **own}}, evaluate=ON_TRANSFORMERS))


@pytest.mark.parametrize("capture", [{}, {"mode": "sample", "draws": 3}])
def test_rounds_that_need_the_label_in_the_head_say_how_and_take_it(capture):
    stage = {"name": "own", "losses": [{"name": "reverse_kl"}], "rounds": {"count": 1}, "trainer": {"max_steps": 1}}
    said = refused(Recipe, recipe(capture=capture, stages=[stage], evaluate=ON_TRANSFORMERS | {"models": ["own"]}))
    advice = said.split("say `capture: {")[1].split("}`")[0]
    written = {**capture, **dict(pair.split(": ") for pair in advice.split(", "))}
    assert Recipe.model_validate(
        recipe(capture=written, stages=[stage], evaluate=ON_TRANSFORMERS | {"models": ["own"]})
    )


def test_rounds_with_targets_say_which_layer_they_learn_from_and_take_the_advice():
    stage = {"name": "own", "losses": [{"name": "forward_kl"}], "rounds": {"count": 1}, "trainer": {"max_steps": 1}}
    models = ON_TRANSFORMERS | {"models": ["own"]}
    said = refused(Recipe, recipe(stages=[{**stage, "targets": "teacher"}], evaluate=models))
    assert "learns from the layer that `teacher` and `capture` mean" in said and "leave it out" in said
    assert Recipe.model_validate(recipe(stages=[stage], evaluate=models))


def test_section_for_another_engine_keeps_what_that_reads():
    served = Recipe.model_validate(recipe(teacher={**SERVED, "dtype": "float32", "max_model_len": 96})).teacher
    ours = on_engine("transformers", served, batch_tokens=7)
    assert (ours.engine, ours.dtype, ours.max_model_len, ours.batch_tokens) == ("transformers", "float32", 96, 7)
    assert Recipe.model_validate(recipe(teacher=ours.model_dump(mode="json"))).teacher == ours
    vllm = on_engine("vllm", ours, quantization="fp8", servers=())
    assert (vllm.quantization, vllm.batch_tokens, vllm.servers) == ("fp8", 4096, ())


def test_a_student_answers_on_our_engines_whatever_else_runs_its_teacher() -> None:
    class AddedTeacher(InProcess):
        engine: str = "added"

    assert engine_of_student(AddedTeacher(model="t"), None) == "vllm"
    assert engine_of_student(AddedTeacher(model="t"), "transformers") == "transformers"
    assert on_engine(engine_of_student(AddedTeacher(model="t"), None), AddedTeacher(model="t")).engine == "vllm"


def test_capture_always_has_temperature_one_and_sorts():
    assert TopCapture(temperatures=(4, 2.0, 2)).temperatures == (1.0, 2.0, 4.0)
    drawn = SampleCapture(mode="sample", draws=12)
    assert (drawn.k, drawn.mass, drawn.label, TopCapture().draws) == (0, 1.0, "apart", 0)
    for bad in (0, -1.0, math.inf, math.nan):
        refused(Capture, {"temperatures": [bad]})


def test_loss_temperature_that_the_recipe_does_not_capture_is_refused():
    hot = recipe(stages=[{"name": "kd", "losses": [{**KL, "temperature": 2.0}]}])
    assert "temperature 2 is not captured, only 1" in refused(Recipe, hot)
    Recipe.model_validate({**hot, "capture": {"temperatures": [2.0]}})
    stepped = [{**KL, "temperature": {"kind": "step", "values": [4, 2, 1], "at": [0.2, 0.6]}}]
    assert "temperature 4 is not captured, only 1, 2" in refused(
        Recipe, {**hot, "capture": {"temperatures": [2.0]}, "stages": [{"name": "kd", "losses": stepped}]}
    )


def test_loss_temperature_of_a_recipe_that_reuses_a_cache_is_left_to_the_cache():
    hot = [{"name": "kd", "losses": [{**KL, "temperature": 2.0}]}]
    loaded = Recipe.model_validate(recipe(teacher=None, prompts=None, generate=None, stages=hot))
    assert (loaded.stages[0].losses[0].temperature.start, loaded.capture.temperatures) == (2.0, (1.0,))


def test_temperature_schedule_through_uncaptured_values_is_refused():
    assert "not captured" in refused(Loss, {**KL, "temperature": {"kind": "linear", "start": 2, "end": 1}})


@pytest.mark.parametrize(
    "loss, why",
    [
        ({"name": "forward_kl", "beta": 0.3}, "only 'jsd' has `beta`"),
        ({"name": "forward_kl", "beta": 0.5}, "only 'jsd' has `beta`"),
        ({"name": "contrastive", "temperature": 1.0}, "'contrastive' does not"),
        ({"name": "jsd", "skew": 0.3}, "only 'skew_forward_kl', 'skew_reverse_kl' have `skew`"),
        ({"name": "cross_entropy", "temperature": 2}, "'cross_entropy' does not, so leave it out"),
        ({"name": "forward_kl", "temperature": 0}, "above 0"),
        ({"name": "jsd", "beta": 1.0}, "less than 1"),
        ({"name": "forward_kl", "weight": -0.1}, "greater than or equal to 0"),
        ({"name": "forward_kl", "weight": True}, "number"),
        ({"name": "forward_kl", "alpha": 0.5}, "alpha"),
    ],
)
def test_loss_option_that_cannot_be_honoured_is_refused(loss, why):
    assert why in refused(Loss, loss)


@pytest.mark.parametrize(
    "start, place, why",
    [
        ("base", 1, None),
        ("previous", 1, None),
        ("sft", 1, None),
        ("previous", 0, "no stage before the first"),
        ("kd", 1, "'kd' does not come earlier"),
        ("sft", 0, "'sft' does not come earlier"),
        ("stf", 1, "did you mean 'sft'?"),
        ("/no/such/directory", 1, "no directory '/no/such/directory'"),
    ],
)
def test_stage_starts_only_from_what_is_there_before_it(start, place, why):
    stages = [{"name": "sft", "losses": [KL]}, {"name": "kd", "losses": [KL]}]
    stages[place]["init_from"] = start
    if why is None:
        assert Recipe.model_validate(recipe(stages=stages)).stages[place].init_from == start
    else:
        assert why in refused(Recipe, recipe(stages=stages))


def test_stage_may_start_from_an_existing_directory(tmp_path):
    stages = [{"name": "kd", "losses": [KL], "init_from": str(tmp_path)}]
    assert Recipe.model_validate(recipe(stages=stages)).stages[0].init_from == str(tmp_path)


@pytest.mark.parametrize(
    "stages, why",
    [
        ([{"name": "base", "losses": [KL]}], "reserved"),
        ([{"name": "../up", "losses": [KL]}], "pattern"),
        ([{"name": "kd", "losses": []}], "at least 1"),
        ([{"name": "kd", "losses": [KL]}, {"name": "kd", "losses": [KL]}], "listed twice"),
        ([{"name": "kd", "losses": [KL, KL]}], "listed twice"),
        ([{"name": "kd", "losses": [{**KL, "weight": 0}]}], "nothing to minimise"),
        ([{"name": "kd", "losses": [KL], "mixture": {}}], "names no source"),
        ([{"name": "kd", "losses": [KL], "mixture": {"a": 0}}], "always 0"),
        ([{"name": "kd", "losses": [KL], "max_length": 4096}], "does not fit a pack of 2048"),
    ],
)
def test_stage_that_cannot_be_trained_is_refused(stages, why):
    assert why in refused(Recipe, recipe(stages=stages))


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"teacher": {"model": "t", "engine": "server"}}, "servers"),
        ({"teacher": {**SERVED, "servers": []}}, "at least 1"),
        ({"teacher": {"model": "t", "servers": ["http://a"]}}, "only 'server' has `servers`, 'vllm' does not"),
        ({"teacher": {"model": "t", "servers": []}}, "only 'server' has `servers`, 'vllm' does not"),
        ({"teacher": {**REFERENCE, "server_requests": 64}}, "'server' has `server_requests`, 'transformers' does"),
        ({"teachers": {"b": {"model": "t", "server_patience_seconds": 600}}}, "only 'server' has `server_patience"),
        ({"teacher": {"model": "t", "engine": "servr"}}, "'transformers', 'server'; did you mean 'server'?"),
        ({"teacher": {"model": "t", "engin": "server"}}, "unknown key; did you mean 'engine'?"),
        ({"teacher": {**SERVED, "servers": ["a:8000"]}}, "no address of a server"),
        ({"teacher": {**SERVED, "servers": ["http://a:99999/v1"]}}, "no address of a server"),
        ({"teacher": {**SERVED, "servers": ["http://a/v1?key=1"]}}, "leave out what follows"),
        ({"teacher": {**SERVED, "servers": ["http://a/v1", "http://a/"]}}, "listed twice"),
        ({"teacher": {**SERVED, "tensor_parallel_size": 1}}, "only 'vllm' has `tensor_parallel_size`, 'server' does"),
        (
            {"teacher": {**SERVED, "gpu_memory_utilization": 0.5}},
            "'transformers' have `gpu_memory_utilization`",
        ),
        ({"teacher": {**SERVED, "quantization": None}}, "only 'vllm' has `quantization`, 'server' does not"),
        ({"teacher": {**SERVED, "server_requests": 0}}, "greater than or equal to 1"),
        ({"teacher": SERVED, "capture": {"temperatures": [2]}}, "no tails at other temperatures"),
        ({"teacher": SERVED, "capture": {"mode": "sample", "draws": 8}}, "no drawn tokens"),
        (
            {"teacher": {"model": "t", "workers": {"count": 2, "gpus_per_engine": 2}}},
            "= 1 GPUs, so 2 cannot be",
        ),
        (
            {"teacher": {"model": "t", "tensor_parallel_size": 2, "workers": {"count": 2}}},
            "so 1 cannot be; write 2, or 0",
        ),
        ({"teacher": {**SERVED, "workers": {"count": 2}}}, "have `workers`, 'server' does not"),
        ({"teacher": {**REFERENCE, "workers": {"count": 2, "gpus_per_engine": 2}}}, "= 1 GPUs, so 2 cannot be"),
        ({"teacher": {**REFERENCE, "tensor_parallel_size": 2}}, "only 'vllm' has `tensor_parallel_size`"),
        ({"teacher": {**REFERENCE, "quantization": "fp8"}}, "only 'vllm' has `quantization`, 'transformers' does not"),
        ({"teacher": {**REFERENCE, "gpu_memory_utilization": 0.5}}, "engine 'vllm' reads"),
        ({"teacher": {**REFERENCE, "max_num_batched_tokens": 8192}}, "engine 'vllm' reads"),
        ({"teacher": {"model": "t", "batch_tokens": 9}}, "engine 'transformers' reads"),
        ({"teacher": {"model": "t", "batch_tokens": 4096}}, "engine 'transformers' reads"),
        ({"teacher": {**SERVED, "batch_tokens": 9}}, "engine 'transformers' reads"),
        ({"teachers": {"b": {"model": "t", "batch_tokens": 9}}, "evaluate": ON_TRANSFORMERS}, "'transformers' reads"),
        ({"teacher": SERVED, "generate": {"model": "other"}}, "serves the teacher only"),
        ({"generate": {"model": ""}}, "at least 1 character"),
        ({"teacher": {"model": "t", "adapter": "polite", "quantization": "fp8"}}, "folded into the weights"),
        ({"generate": {"temperature": 0, "samples_per_prompt": 2}}, "are the same"),
        ({"generate": {"temperature": 0, "top_p": 0.9}}, "takes the most probable token"),
        ({"generate": {"temperature": 0, "top_k": 5}}, "takes the most probable token"),
        ({"evaluate": {"own_answers": {"temperature": 0, "top_p": 0.9}}}, "takes the most probable token"),
        ({"student": {"model": "s", "adapter": {"kind": "none", "r": 8}}}, "adds nothing"),
        ({"student": {"model": "s", "adapter": {"target_modules": ["q_proj"]}}}, "adds nothing"),
        ({"teacher": {"model": "t", "workers": {}}, "generate": {"model": "s"}}, "all run the teacher"),
        ({"teacher": {"model": "t", "workers": {}}, "capture": {"hidden": {"layers": 2}}}, "by one engine"),
        ({"teacher": None}, "no `teacher`"),
        ({"prompts": None}, "no `prompts`"),
        ({"student": None}, "no `student`"),
        ({"cache": ["a", "b"]}, "one cache, not 2"),
        ({"cache": []}, "at least 1"),
        ({"evaluate": {"models": ["kdd"]}}, "did you mean 'kd'?"),
        ({"evaluate": {"models": ["kd", "kd"]}}, "listed twice"),
        ({"heldout": {"fraction": 1.0}}, "less than 1"),
        ({"heldout": {"fraction": 0}, "evaluate": {"heldout_rows": 9}}, "nothing is held out"),
        ({"rows_per_part": 0}, "greater than or equal to 1"),
        ({"seed": "3"}, "number"),
    ],
)
def test_recipe_that_cannot_be_honoured_is_refused(changes, why):
    assert why in refused(Recipe, recipe(**changes))


def test_every_cross_field_problem_is_reported_at_once():
    text = refused(Recipe, recipe(student=None, cache=["a", "b"], evaluate={"models": ["nobody"]}))
    assert all(part in text for part in ("no `student`", "one cache", "nobody"))


def test_prompts_that_no_template_renders_refuse_template_options():
    source = {"source": "a", "path": "a.txt", "format": "text", "system": "be brief"}
    assert "leave it out" in refused(Recipe, recipe(prompts=[source]))


def test_template_of_questions_that_are_all_the_same_is_refused():
    assert "every question would be the same" in refused(
        Task, {"name": "gsm8k", "path": "a.jsonl", "prompt_template": "Solve { prompt }."}
    )


def test_task_domain_is_the_file_name_up_to_its_first_dot():
    assert Task(name="gsm8k", path="data/math.test.jsonl").domain == "math"
    assert Task(name="gsm8k", path="data/math.test.jsonl", domain="sums").domain == "sums"
    assert "own" in refused(
        Recipe, recipe(evaluate={"tasks": [{"name": "gsm8k", "path": "a/m.x"}, {"name": "keywords", "path": "b/m.y"}]})
    )


def test_trainer_refuses_pairs_of_which_one_counts():
    assert "keep one" in refused(StageTrainer, {"bf16": True, "fp16": True})
    assert "keep one" in refused(StageTrainer, {"warmup_steps": 3, "warmup_ratio": 0.1})
    assert StageTrainer.model_validate({"report_to": "none", "max_steps": 1e3}).max_steps == 1000


@pytest.mark.parametrize("warmup", [{"warmup_steps": 3}, {"warmup_ratio": 0.1}])
def test_constant_rate_has_no_warmup(warmup):
    assert "constant_with_warmup" in refused(StageTrainer, {"lr_scheduler_type": "constant", **warmup})
    StageTrainer.model_validate({"lr_scheduler_type": "constant_with_warmup", **warmup})


@pytest.mark.parametrize("changes", [
    {"capture": {"hidden": {"layers": 2}}},
    {"evaluate": {"models": ["teacher"], "engine": "transformers"}},
])  # fmt: skip
def test_setting_of_an_engine_that_does_something_else_in_the_recipe_is_kept(changes):
    loaded = Recipe.model_validate(recipe(teacher={"model": "t", "batch_tokens": 9}, **changes))
    assert loaded.teacher is not None
    assert loaded.teacher.batch_tokens == 9
    assert dump_recipe(Recipe.model_validate(loaded.model_dump(mode="json"))) == dump_recipe(loaded)


def test_every_field_of_every_section_has_help():
    def sections(schema):
        yield schema
        yield from schema.get("$defs", {}).values()

    bare = [
        f"{section.get('title')}.{name}"
        for section in sections(Recipe.model_json_schema())
        for name, field in section.get("properties", {}).items()
        if "description" not in field and "description" not in field.get("anyOf", [{}])[-1]
    ]
    assert bare == []


def test_password_in_an_address_is_refused_and_not_repeated():
    address = "http://me:hunter2@a:8000/v1"
    assert "hunter2" not in str(address_problem(address))
    assert "DECANT_SERVER_API_KEY" in refused(Recipe, recipe(teacher={**SERVED, "servers": [address]}))


def test_servers_are_accepted_with_what_they_can_do():
    loaded = Recipe.model_validate(
        recipe(teacher={**SERVED, "servers": ["http://a", "https://b:1/x/v1"], "adapter": "polite"})
    )
    assert loaded.teacher is not None
    assert (loaded.teacher.server_requests, loaded.teacher.server_patience_seconds) == (64, 600.0)


@pytest.mark.parametrize("cache", ["run/cache", "s3://bucket/demo", ["a", "https://host/b"]])
def test_recipe_crosses_to_another_process_as_json(cache):
    recipe = Recipe.model_validate({"name": "t", "output_dir": "run", "cache": cache})
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
