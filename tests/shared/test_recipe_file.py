"""Recipe files: YAML 1.2, places of problems, and the way back to a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from shared.errors import RecipeError
from shared.recipe.file import dump_recipe, load_recipe, recipe_json_schema
from shared.recipe.recipe import Recipe
from shared.recipe.yaml import MAX_BYTES, YamlProblem, parse_yaml

ROOT = Path(__file__).resolve().parents[2]

GOOD = """\
name: x
output_dir: runs/x
teacher: {model: t}
prompts:
  - {source: no, path: a.jsonl, format: messages}
  - {source: on, path: b.jsonl, format: messages}
cache: runs/x/cache
student: {model: s, adapter: lora}
stages:
  - name: sft
    losses: [{name: cross_entropy}]
  - name: kd
    losses:
      - name: forward_kl
        weight: 0.9
    trainer:
      learning_rate: 1e-5
"""


@pytest.fixture
def write(tmp_path):
    def write_file(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_file


def complaint(path, overrides=()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(str(path), "FILE").splitlines()


def test_scalars_follow_yaml_1_2(write):
    recipe = load_recipe(write(GOOD))
    assert [source.source for source in recipe.prompts] == ["no", "on"]
    assert recipe.stages[1].trainer.learning_rate == 1e-5


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-5", 1e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("0o17", 15),
        ("0x1F", 31),
        ("012", 12),
        ("yes", "yes"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("null", None),
        ("", None),
        ("True", True),
        ("'1'", "1"),
        ("1.5.2", "1.5.2"),
        ("=", "="),
        ("-.inf", float("-inf")),
        ("[a, 1]", ["a", 1]),
        ("{a: {b: }}", {"a": {"b": None}}),
        ("!!str 3", "3"),
    ],
)
def test_scalar_has_the_value_of_yaml_1_2(text, value):
    data = parse_yaml(f"key: {text}\n").data["key"]
    assert data == value
    assert type(data) is type(value)


@pytest.mark.parametrize(
    "text, line, part",
    [
        ("a: 1\nb: 2\na: 3\n", 3, "written twice, first in line 1"),
        ("x:\n  a: 1\n  a: 1\n", 3, "x.a"),
        ("a: 1\nb: [1, 2\nc: 3\n", 3, "no valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "no valid YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "tag"),
        ("a: 1\nb: !mine x\n", 2, "tag '!mine'"),
        ("? [a, b]\n: 1\n", 1, "a key must be a word"),
        ("%YAML 1.1\n---\na: no\n", 1, "YAML 1.2"),
        ("a: *nowhere\n", 1, "no valid YAML"),
        ("a: &a [*a]\n", 1, "levels"),
        ("a: 1\n---\nb: 2\n", 2, "no valid YAML"),
        ("a: \x01\n", 1, "no valid YAML"),
        ("a: " + "[" * 600 + "]" * 600, 1, "levels"),
        ("a: !!int x1\n", 1, "is no number"),
        ("a: 1\nb: !!bool banana\n", 2, "bool' is not supported here"),
        ("a: !!null nothing\n", 1, "null' is not supported here"),
        ("a: " + "9" * 5000, 1, "needs more than 64 bits"),
        ("a: 0x" + "f" * 5000, 1, "needs more than 64 bits"),
        ("!" * 1000, 1, "!!!' is not supported here; remove it"),
    ],
)
def test_text_that_is_refused_names_its_line(text, line, part):
    with pytest.raises(YamlProblem) as caught:
        parse_yaml(text)
    assert (caught.value.line, part in caught.value.sentence) == (line, True), caught.value.sentence


def test_aliases_are_copied_but_cannot_explode():
    assert parse_yaml("a: &a {x: 1}\nb: *a\n").data == {"a": {"x": 1}, "b": {"x": 1}}
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    with pytest.raises(YamlProblem, match="aliases included"):
        parse_yaml(bomb)


@pytest.mark.parametrize(
    "change, expected",
    [
        (("name: x\n", "nmae: x\n"), "FILE:1: nmae: unknown key; did you mean 'name'?"),
        (
            ("- name: forward_kl", "- nam: forward_kl"),
            "FILE:14: stages.1.losses.0.nam: unknown key; did you mean 'name'?",
        ),
        (
            ("weight: 0.9", "weight: -1"),
            "FILE:15: stages.1.losses.0.weight: expected greater than or equal to 0, found -1",
        ),
        (("name: forward_kl", "name: foward_kl"), "did you mean 'forward_kl'?"),
        (
            ("learning_rate: 1e-5", "learning_rate: fast"),
            "FILE:17: stages.1.trainer.learning_rate: expected a number, found 'fast'",
        ),
        (
            ("learning_rate: 1e-5", "lerning_rate: 1"),
            "stages.1.trainer.lerning_rate: unknown key; did you mean 'learning_rate'?",
        ),
        (
            ("    trainer:\n      learning_rate: 1e-5", "    learning_rate: 1"),
            "stages.1.learning_rate: unknown key; did you mean 'trainer.learning_rate'?",
        ),
        (
            ("adapter: lora", "adapter: lorra"),
            "student.adapter: 'lorra' is not one of 'none', 'lora' or 'qlora'; did you mean 'lora'?",
        ),
        (("teacher: {model: t}", "teacher: {}"), "FILE:3: teacher.model: is missing, and has no default"),
        (("teacher: {model: t}", "teacher: t"), "FILE:3: teacher: expected a section with keys, found 't'"),
        (
            ("teacher: {model: t}", "teacher: {model: t, engine: server}"),
            "FILE:3: teacher.servers: is missing, and has no default",
        ),
        (
            ("teacher: {model: t}", "teacher: {model: t, quantisation: fp8}"),
            "FILE:3: teacher.quantisation: unknown key; did you mean 'quantization'?",
        ),
        (
            ("teacher: {model: t}", "teacher: {model: t, batch_tokens: -1}"),
            "FILE:3: teacher.batch_tokens: expected greater than or equal to 1, found -1",
        ),
        (
            ("teacher: {model: t}", "teacher: {model: t, servers: []}"),
            "FILE:3: teacher.servers: only 'server' has `servers`, 'vllm' does not, so leave it out",
        ),
        (
            ("cache: runs", "teachers:\n  model:\n    model: t\n    revison: x\ncache: runs"),
            "FILE:10: teachers.model.revison: unknown key; did you mean 'revision'?",
        ),
        (
            ("cache: runs", "capture:\n  mode: top+sample\n  dawns: 3\ncache: runs"),
            "FILE:9: capture.dawns: unknown key; did you mean 'draws'?",
        ),
        (
            ("cache: runs", "capture:\n  gap_step: 9\n  mas: 1\ncache: runs"),
            "FILE:9: capture.mas: unknown key; did you mean 'mass'?",
        ),
        (
            ("cache: runs", "capture:\n  mod: sample\n  draws: 3\ncache: runs"),
            "FILE:8: capture.mod: unknown key; did you mean 'mode'?",
        ),
        (
            ("cache: runs", "capture: sample\ncache: runs"),
            "FILE:7: capture: expected a section with keys, found 'sample'; write {mode: sample}",
        ),
        (("name: kd", "name: kd\n    init_from: stf"), "nor a directory (written with a '/'); did you mean 'sft'?"),
        (
            ("name: sft", "name: teacher"),
            "FILE:10: stages.0.name: 'teacher' is reserved; call the stage something else",
        ),
        (("name: sft", "name: ../sft"), "FILE:10: stages.0.name: '../sft' is no usable name"),
        (("prompts:\n", "prompts: all\nx:\n"), "FILE:4: prompts: expected a list, found 'all'"),
        (("cache: runs/x/cache\n", ""), "FILE:1: cache: is missing, and has no default"),
        (("cache: runs/x/cache", "cache:"), "FILE:7: cache: expected a path, found nothing"),
        (("cache: runs/x/cache", "cache: ''"), "FILE:7: cache: expected a path, found ''"),
        (("output_dir: runs/x", "output_dir: ''"), "FILE:2: output_dir: expected a path, found ''"),
        (("- name: kd", "- name: kd\n    max_length: 1.5"), "stages.1.max_length: expected a whole number, found 1.5"),
        (("- name: forward_kl", "- jsd\n      - name: forward_kl"), "found 'jsd'; write {name: jsd}"),
        (
            ("teacher: {model: t}", "teacher: {model: t, engine: null}"),
            "engine: nothing is not one of 'vllm', 'transformers', 'server'",
        ),
        (("learning_rate: 1e-5", "optim: AdamW"), "no optimizer that a stage can use; did you mean 'adamw_torch'?"),
        (
            ("teacher: {model: t}", "teacher: {model: t, adapter: ''}"),
            "FILE:3: teacher.adapter: expected text, found ''",
        ),
    ],
)
def test_problem_names_file_line_path_and_the_nearest_word(write, change, expected):
    assert GOOD.count(change[0]) == 1
    lines = complaint(write(GOOD.replace(*change)))
    assert any(line.startswith(expected) or line.endswith(expected) for line in lines), lines


@pytest.mark.parametrize(
    "value, expected",
    [
        ("[{layer: math, weight: -1}]", ".0.weight: expected greater than or equal to 0, found -1"),
        ("[{lyer: math}]", ".0.lyer: unknown key; did you mean 'layer'?"),
        ("[{layer: math, sources: b}]", ".0.sources: expected a list, found 'b'"),
        ("[math]", ".0: expected a section with keys, found 'math'"),
        ("[]", ": expected at least 1, found an empty list"),
        ("3", ": expected text, found 3"),
    ],
)
def test_what_is_wrong_in_a_list_is_said_where_a_text_would_do_too(write, value, expected):
    override = f"stages.kd.targets={value}"
    assert complaint(write(GOOD), [override]) == [f"--set {override}: stages.1.targets{expected}"]


@pytest.mark.parametrize("by_override", [False, True])
def test_the_password_in_a_cache_address_is_not_repeated(write, by_override):
    address = "https://me:hunter2@host/demo"
    text = GOOD if by_override else GOOD.replace("cache: runs/x/cache", f"cache: {address}")
    (line,) = complaint(write(text), [f"cache={address}"] if by_override else [])
    assert "comes with a password" in line
    assert "hunter2" not in line


def test_a_name_with_a_line_break_is_refused_in_one_line(write):
    override = 'teachers={"a\\nb": {model: t}}'
    (line,) = complaint(write(GOOD), [override])
    assert ": teachers.a\\nb: 'a\\nb' is no usable name" in line


@pytest.mark.parametrize("override", ["seed=\n", "seed=\n7.5", "=\n", "seed=[\n", "no\nsuch.key=1", "name.a=\n"])
def test_an_override_or_a_file_name_with_a_line_break_makes_no_second_line(write, tmp_path, override):
    assert len(complaint(write(GOOD), [override])) == 1
    for name in ("a\nb: forged.yaml", "missing\nrecipe.yaml"):
        path = tmp_path / name
        if "missing" not in name:
            path.write_text("- no recipe")
        assert len(complaint(path)) == 1


def test_all_problems_are_listed_in_the_order_of_the_file(write):
    text = GOOD.replace("name: x", "name: 7").replace("weight: 0.9", "weight: no").replace("model: s", "modle: s")
    places = [line.split(": ")[:2] for line in complaint(write(text))]
    assert places == [["FILE:1", "name"], ["FILE:8", "student.modle"], ["FILE:15", "stages.1.losses.0.weight"]]


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "expected a mapping"),
        (b"- a\n", "expected a mapping"),
        (b"name: \xff\n", "FILE:1: byte 0xff is not UTF-8"),
        (b"#" * (MAX_BYTES + 1), "longer than"),
    ],
)
def test_file_that_is_no_recipe_is_refused(write, content, part):
    assert part in complaint(write(content))[0]


def test_missing_file_and_directory_are_refused(tmp_path):
    assert "cannot be read" in complaint(tmp_path / "none.yaml")[0]
    assert "cannot be read" in complaint(tmp_path)[0]


def test_a_recipe_that_is_not_there_is_told_with_the_name_that_is(write):
    path = write(GOOD)
    with pytest.raises(RecipeError, match=rf"{path.stem}.yml: cannot be read .*; did you mean '{path.name}'"):
        load_recipe(path.with_suffix(".yml"))
    with pytest.raises(RecipeError, match=r"No such file or directory\); expected a recipe, see `decant init`"):
        load_recipe(path.parent / "none" / "other.yaml")


RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "cluster")
"""recipes/cluster holds files of Ray and SLURM."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_project_validates_and_has_a_run_book(path):
    assert dump_recipe(load_recipe(path))
    assert path.read_text().startswith("#")


def test_the_project_has_its_recipes():
    names = {path.stem for path in (ROOT / "recipes").rglob("*.y*ml") if path.parent.name != "cluster"}
    assert "demo" in names
    assert len(names) == len(RECIPES) >= 1


def test_demo_recipe_is_the_documented_one():
    demo = load_recipe(ROOT / "recipes" / "demo.yaml")
    assert (demo.capture.k, demo.capture.mass, demo.capture.temperatures) == (64, 0.999, (1.0,))
    assert [(loss.name, loss.weight.start) for loss in demo.stage("kd").losses] == [
        ("forward_kl", 0.9),
        ("cross_entropy", 0.1),
    ]
    assert demo.evaluate.models == ("teacher", "base", "sft", "kd", "more", "own")
    assert [task.domain for task in demo.evaluate.tasks] == ["math", "code", "aiops", "copy"]
    own = demo.stage("own")
    assert demo.stage("more").trainer.max_steps == own.rounds.count * own.trainer.max_steps


HEAD = "name: x\noutput_dir: o\ncache: c\n"
STAGE = "student: {model: s}\nstages: [{name: a, losses: [{name: forward_kl}]%s}]\n"


@pytest.mark.parametrize(
    "text, part",
    [
        ("seed: -1\n" + STAGE % "", "seed: expected a number from 0 to 4294967295, found -1"),
        ("seed: 99999999999\nteacher: {model: t}\nevaluate: {models: [teacher]}\n", "found 99999999999"),
        (STAGE % ", trainer: {seed: 4294967296}", "stages.0.trainer.seed: expected less than or equal to 4294967295"),
        (
            STAGE % ", trainer: {pack_tokens: 1e18}",
            "stages.0.trainer.pack_tokens: expected less than or equal to 2147483647",
        ),
        (STAGE % ", max_length: 99999999999", "stages.0.max_length: expected less than or equal to"),
        ("teacher: {model: t, batch_tokens: 1e300}\n", "teacher.batch_tokens: "),
        (
            "generate: {seed: 99999999999999999999}\n",
            "4: the whole number 99999999999999999999 needs more than 64 bits",
        ),
        ("prompts: [{chat_template_kwargs: {a: -0xffffffffffffffff}}]\n", "needs more than 64 bits"),
        ("prompts: [{source: a, path: b, format: messages, date: 0}]\n", "prompts.0.date: expected a date such as"),
        ("evaluate: {tasks: [{name: gsm8k, path: a, seed: 1e20}]}\n", "evaluate.tasks.0.seed: "),
        ('student: {model: "a\\0b"}\n', "holds the character '\\x00'"),
        ('student: {model: s, revision: "\\ud800"}\n', "holds the character '\\ud800'"),
    ],
)
def test_numbers_and_texts_that_no_machine_holds_are_refused(write, text, part):
    assert any(part in line for line in complaint(write(HEAD + text)))


@pytest.mark.parametrize("path", ["stages.²=1", "stages.99999999999999999999=1", "stages.٣.name=x"])
def test_an_index_that_is_no_plain_number_is_no_index(write, path):
    assert "--set stages" in complaint(write(GOOD), [path])[0]


def _many(count):
    yield "".join(f"k{i}: x\n" for i in range(count))
    stages = "".join(
        f"  - {{name: s{i}, init_from: z{i}, losses: [{{name: forward_kl}}]}}\n" for i in range(count // 7)
    )
    yield f"{HEAD}student: {{model: s}}\nstages:\n{stages}"
    yield f"{HEAD}evaluate: {{models: [{', '.join(f'm{i}' for i in range(count))}]}}\n"
    yield HEAD.replace("cache: c", f"cache: [{', '.join('ab'[i % 2] for i in range(count))}]")


@pytest.mark.parametrize("kind", [3, *(pytest.param(kind, marks=pytest.mark.slow) for kind in range(3))])
def test_thousands_of_problems_are_counted_and_the_first_are_listed(write, kind):
    text = list(_many(15_000))[kind]
    found = complaint(write(text))
    assert len(found) <= 60 and found[-1].endswith("problems more")


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20)
number = st.floats(0, 1e6, allow_nan=False)
schedule = number | st.fixed_dictionaries(
    {"kind": st.sampled_from(["linear", "cosine"]), "start": number, "end": number}
)
sources = st.fixed_dictionaries(
    {"source": text, "path": text, "format": st.just("sharegpt"), "system": st.none() | text}
)
losses = st.fixed_dictionaries({"name": st.sampled_from(["forward_kl", "jsd"]), "weight": schedule | st.just(1e-7)})


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    model=text,
    sources=st.lists(sources, max_size=3),
    loss=losses,
    seed=st.integers(0, 2**32 - 1),
    kwargs=st.dictionaries(
        text, st.none() | st.booleans() | text | st.integers(-(2**63), 2**63 - 1) | number, max_size=3
    ),
)
def test_dumped_recipe_loads_to_an_equal_recipe(tmp_path_factory, model, sources, loss, seed, kwargs):
    data = {
        "name": "x",
        "output_dir": "o",
        "cache": ["c"],
        "seed": seed,
        "teacher": {"model": model},
        "prompts": sources,
    }
    data["student"] = {"model": "no", "adapter": "qlora"}
    data["stages"] = [
        {"name": "1e5", "losses": [loss, {"name": "cross_entropy"}], "trainer": {"lr_scheduler_kwargs": kwargs}}
    ]
    recipe = Recipe.model_validate(data)
    path = tmp_path_factory.mktemp("dump") / "r.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_json_schema_carries_help_and_is_json():
    schema = json.loads(json.dumps(recipe_json_schema()))
    assert schema["$defs"]["VllmTeacher"]["properties"]["model"]["description"] == "A directory or a hub id."
    assert schema["additionalProperties"] is False
