"""`decant plan`: rows and tokens against the tokenizer itself, bytes against the codec, estimates said to be
estimates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from shared.cache.cache import Cache
from shared.errors import ModelError, PromptError, UsageError
from shared.payload.codec import Codec
from shared.recipe.file import dump_recipe
from shared.recipe.recipe import Recipe
from tests.shared.dense_targets import cut
from tests.shared.small_cache import TOP, build
from tests.tiny_models import make_tokenizer
from tests.tools.rounds.tiny_run import rounds_recipe
from tools import cli
from tools.plan.plan_existing import assumed_bytes_per_position
from tools.plan.planner import plan, plan_text
from tools.plan.preflight.checks import preflight
from tools.plan.preflight.preflight_asked import Asked
from tools.plan.preflight.preflight_evaluate import evaluation_problems
from tools.plan.preflight.preflight_rounds import answer_problems

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "architectures": ["Qwen3ForCausalLM"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Prompts with a duplicate and a bad row, and a model directory without weights."""
    path = tmp_path_factory.mktemp("plan")
    make_tokenizer(path / "teacher")
    (path / "teacher" / "config.json").write_text(json.dumps(CONFIG))
    turns = [
        [{"role": "user", "content": f"Anna has {i} apples"}, {"role": "assistant", "content": f"She has {i}."}]
        for i in range(12)
    ]
    rows = [json.dumps({"messages": messages}) for messages in [*turns, turns[3]]]
    (path / "a.jsonl").write_text("\n".join([*rows, '{"messages": []}']) + "\n")
    return path


def recipe(place, **changes) -> Recipe:
    data = {
        "name": "x",
        "output_dir": str(place / "run"),
        "cache": str(place / "run" / "cache"),
        "teacher": {"model": str(place / "teacher")},
        "prompts": [{"source": "a", "path": str(place / "a.jsonl"), "format": "messages"}],
        "generate": {"max_new_tokens": 10},
        "rows_per_part": 5,
    }
    return Recipe.model_validate({key: value for key, value in {**data, **changes}.items() if value is not None})


def test_the_place_of_a_row_that_cannot_be_rendered_is_said_once(place):
    path = place / "special.jsonl"
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("fine", "Hi <|im_end|>")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = plan(recipe(place, prompts=[{"source": "a", "path": str(path), "format": "messages"}]))
    assert result["first_problem"].startswith(f"{path}:2: the user turn contains the special token")


def test_prompt_tokens_are_those_of_the_tokenizer(place):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "teacher")
    prompts = [[{"role": "user", "content": f"Anna has {i} apples"}] for i in range(12)]
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    expected = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    result = plan(recipe(place))
    source = result["sources"]["a"]
    assert (source["rows"], source["duplicates"], source["prompt_tokens"], result["set_aside"]) == (12, 1, expected, 1)
    assert (result["rows_to_do"], result["units"]) == (12, 3)
    assert result["generate_tokens"] == {"expected": 60, "at_most": 120}
    assert result["score_tokens"] == {"expected": expected + 60, "at_most": expected + 120}
    assert result["hours"] is None


def test_given_answers_are_counted_exactly(place):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "teacher")
    result = plan(recipe(place, generate=None))
    answers = sum(len(tokenizer(f"She has {i}.<|im_end|>")["input_ids"]) for i in range(12))
    assert result["positions"] == {"expected": answers, "at_most": answers}
    assert result["generate_tokens"] is None


def test_unknown_tokenizer_means_an_estimate_that_says_so(place):
    result = plan(recipe(place, teacher={"model": str(place / "nowhere")}))
    characters = sum(len(f"Anna has {i} apples") for i in range(12))
    assert abs(result["sources"]["a"]["prompt_tokens"] - characters / 4) < 24
    assert any("characters" in line for line in result["assumptions"])
    assert "characters" in plan_text(result)


def test_a_tokenizer_that_is_there_and_cannot_be_loaded_is_refused_as_a_build_does(place, tmp_path):
    shutil.copytree(place / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher" / "tokenizer.json").write_text("{}")
    changes = {"teacher": {"model": str(tmp_path / "teacher")}, "cache": str(tmp_path / "cache")}
    with pytest.raises(ModelError, match=r"the tokenizer cannot be loaded: no 'added_tokens'"):
        plan(recipe(place, **changes))
    sizes = {"sources": {"a": {"rows": 12, "prompt_tokens": 5, "answer_tokens": 5}}}
    assert any("estimated" in said for said in plan(recipe(place, **changes, assume=sizes))["assumptions"])


def test_another_capture_over_the_same_rows_is_planned_as_scoring_alone(tmp_path):
    cache = tmp_path / "cache"
    build(cache, layers=(TOP,))
    there = sum(Cache.open(cache)[i].num_positions for i in range(len(Cache.open(cache))))
    tokens = int(Cache.open(cache).num_tokens.sum())
    same = {"k": TOP.k, "temperatures": list(TOP.temperatures)}
    data = {"name": "x", "output_dir": "x", "cache": str(cache), "teacher": {"model": "teacher"}}
    assert "rescore" not in plan(Recipe.model_validate({**data, "capture": same}))
    assert "rescore" not in plan(Recipe.model_validate({**data, "capture": {"k": 4}}))  # TOP holds it
    other = plan(Recipe.model_validate({**data, "capture": {"k": 8}}))
    assert (other["rescore"]["tokens"], other["rescore"]["positions"]) == (tokens, there)
    assert f"score {tokens} tokens, {there} positions" in plan_text(other)


def test_stage_tokens_follow_from_steps_and_packs(place):
    trainer = {"max_steps": 10, "pack_tokens": 64, "gradient_accumulation_steps": 2}
    stages = [{"name": "kd", "losses": [{"name": "forward_kl"}], "trainer": trainer}]
    result = plan(recipe(place, student={"model": "s"}, stages=stages))
    assert (result["stages"]["kd"]["steps"], result["stages"]["kd"]["tokens"]) == (10, 1280)
    assert "10 steps of 128 tokens" in plan_text(result)


@pytest.mark.parametrize("mode, k, draws", [("top", 64, 0), ("top", 8, 0), ("top+sample", 8, 4)])
def test_bytes_at_most_hold_for_random_ids_of_a_real_vocabulary(mode, k, draws):
    asked = {"mode": mode, "k": k} | ({"draws": draws} if draws else {})
    capture = Recipe.model_validate({"name": "x", "output_dir": "x", "cache": "c", "capture": asked}).capture
    rng = np.random.default_rng(0)
    targets = cut(rng, 24, 151_936, np.full(24, k), (1.0,), draws).targets
    measured = len(Codec(capture.gap_step, capture.temperatures, draws).encode(targets)) / 24
    expected, at_most = assumed_bytes_per_position(capture)
    assert expected < at_most
    assert 0.5 * at_most < measured < 1.1 * at_most


def test_a_source_out_of_reach_has_the_size_that_the_recipe_states_and_the_plan_says_so(place):
    far = [
        {"source": "a", "path": str(place / "a.jsonl"), "format": "messages"},
        {"source": "far", "path": str(place / "nowhere.jsonl"), "format": "messages"},
    ]
    sizes = {"far": {"rows": 1000, "prompt_tokens": 30, "answer_tokens": 4}}
    result = plan(recipe(place, prompts=far, assume={"sources": sizes}))
    source = result["sources"]["far"]
    assert (source["rows"], source["prompt_tokens"]) == (1000, 30_000)
    assert source["answer_tokens"] == {"expected": 4000, "at_most": 10_000}
    assert result["sources"]["a"]["rows"] == 12
    assert any("source far has 1,000 prompts" in line and "cannot be reached" in line for line in result["assumptions"])
    with pytest.raises(PromptError, match="no such file"):
        plan(recipe(place, prompts=far))


def test_a_stated_size_for_a_source_that_can_be_read_changes_nothing(place):
    stated = plan(recipe(place, assume={"sources": {"a": {"rows": 7, "prompt_tokens": 1, "answer_tokens": 1}}}))
    assert stated == plan(recipe(place))


def test_prompts_of_which_none_can_be_used_are_refused(place, tmp_path):
    (tmp_path / "none.jsonl").write_text('{"messages": []}\n{"messages": [{"role": "user"}]}\n')
    source = {"source": "a", "path": str(tmp_path / "none.jsonl"), "format": "messages"}
    with pytest.raises(UsageError, match=r"none of 2 prompts can be used, the first: .*none\.jsonl:1"):
        plan(recipe(place, prompts=[source]))


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ({"chat_template": "{{ 1"}, "; correct it$"),
        ({"chat_template_kwargs": {"add_generation_prompt": 1}}, "; correct `chat_template_kwargs`, or give another"),
        ({"chat_template": "{{ messages[0].content }}"}, "does not render an answer's text as it is"),
        ({"chat_template": "{{ 'x' * 9999999999 }}"}, "takes more than 512 MiB to render one conv"),
    ],
)
def test_a_template_that_renders_nothing_is_refused_not_estimated(place, settings, way):
    source = {"source": "a", "path": str(place / "a.jsonl"), "format": "messages", **settings}
    with pytest.raises((PromptError, ModelError), match=f"^source 'a': .*{way}"):
        plan(recipe(place, prompts=[source]))


@pytest.mark.parametrize(("bad", "share"), [(1, 0.077), (5, 0.295), (0, None)])
def test_a_plan_says_what_a_build_has_to_accept(place, tmp_path, capsys, bad, share):
    lines = (place / "a.jsonl").read_text().splitlines()[:12] + ['{"messages": []}'] * bad
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n")
    source = {"source": "a", "path": str(tmp_path / "some.jsonl"), "format": "messages"}
    planned = recipe(place, prompts=[source], cache=str(tmp_path / "cache"), output_dir=str(tmp_path / "run"))
    assert plan(planned)["max_set_aside"] == share
    (tmp_path / "recipe.yaml").write_text(dump_recipe(planned))
    assert cli.main(["plan", str(tmp_path / "recipe.yaml")]) == 0
    words = ["run", str(tmp_path / "recipe.yaml"), *([] if share is None else ["--max-set-aside", f"{share}"])]
    assert capsys.readouterr().out.splitlines()[-1].split()[2:] == words


def test_rounds_over_plain_texts_are_refused_for_they_ask_nothing(tmp_path):
    (tmp_path / "texts.txt").write_text("Once upon a time.\n")
    texts = [{"source": "tales", "path": str(tmp_path / "texts.txt"), "format": "text"}]
    recipe = rounds_recipe(tmp_path, (tmp_path / "teacher", tmp_path / "student"), prompts=texts, generate=None)
    found = dict(answer_problems(Asked(recipe, frozenset({"answer"}), plans_only=True)))
    assert "asks anything" in found["stages", 1, "rounds"]


@pytest.mark.parametrize("kind", ["missing", "unreadable"])
def test_a_prompt_file_that_cannot_be_read_is_named_once_whoever_would_read_it(tmp_path, monkeypatch, kind):
    models = (tmp_path / "teacher", tmp_path / "student")
    own = {"models": ["teacher"], "own_answers": {"prompts": 2}}
    recipe = rounds_recipe(tmp_path, models, rounds={"prompts": 3}, evaluate=own)
    path = tmp_path / "math.jsonl"
    if kind == "missing":
        path.unlink()
    else:
        opened = Path.open

        def refuse(self, *args, **settings):
            if self == path:
                raise PermissionError(13, "Permission denied", str(path))
            return opened(self, *args, **settings)

        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError) as found:
        preflight(recipe, {}, ("teach", "answer", "eval"), plans_only=True)
    said = [line for line in str(found.value).splitlines() if str(path) in line]
    assert len(said) == 1
    assert "prompts.0.path" in said[0]


@pytest.mark.parametrize(
    "asked", [{"tasks": [{"name": "gsm8k", "path": "q.jsonl"}]}, {"cost": True}, {"side_by_side": {}}]
)
def test_what_is_to_be_measured_of_no_model_is_refused_before_work(place, asked):
    with pytest.raises(UsageError, match=f"evaluate.{next(iter(asked))}: there is no model to measure"):
        preflight(recipe(place, evaluate=asked), {}, ("teach",), plans_only=True)
    preflight(recipe(place, evaluate={"cost": False, "tasks": []}), {}, (), plans_only=True)


def test_an_answering_model_that_is_out_of_reach_is_named_and_refuses_no_plan(place):
    def said(model: str) -> list[str]:
        told = recipe(place, generate={"max_new_tokens": 10, "model": model})
        preflight(told, {}, ("teach",), plans_only=True)
        return [line for line in plan(told)["assumptions"] if "generate.model" in line]

    (line,) = said("org/nobody-has-this")
    assert "generate.model is out of reach (org/nobody-has-this: " in line
    assert "`decant teach` needs it" in line
    assert said(str(place / "teacher")) == []


def test_a_layer_that_is_not_captured_yet_is_refused_with_how_to_capture_it_where_there_is_a_teacher(place, tmp_path):
    build(tmp_path / "cache")
    stage = {"name": "kd", "losses": [{"name": "forward_kl"}], "targets": "top8-sample4"}
    changes = {"cache": str(tmp_path / "cache"), "stages": [stage], "student": {"model": str(place / "teacher")}}
    for teacher, said in ((recipe(place).teacher, True), (None, False)):
        more = {} if teacher else {"teacher": None, "prompts": [], "generate": None}
        with pytest.raises(UsageError, match="no targets layer named 'top8-sample4'") as caught:
            preflight(recipe(place, **changes, **more), {}, ("train",), plans_only=True)
        assert ("capture it first: `decant teach`" in str(caught.value)) == said


@pytest.mark.parametrize(("line", "said"), [
    ('{"question": "How many?"}', ":1: no prompt to answer: the column 'prompt' is missing"), ("[", ":1"),
    (None, "no file"),
])  # fmt: skip
def test_a_file_of_prompts_side_by_side_is_read_before_work(place, tmp_path, line, said):
    path = tmp_path / "mine.jsonl"
    if line is not None:
        path.write_text(line + "\n")
    wanted = recipe(place, evaluate={"models": ["teacher"], "side_by_side": {"prompts": [str(path)]}})
    found = dict(evaluation_problems(Asked(wanted, frozenset({"eval"}), plans_only=True)))
    assert said in found["evaluate", "side_by_side", "prompts", 0]
    path.write_text('{"prompt": "How many?"}\n')
    assert not [at for at, _ in evaluation_problems(Asked(wanted, frozenset({"eval"}), True)) if "side_by_side" in at]
