"""Sampled answers side by side: which prompts, what is kept and reused, and measures that can be counted by hand."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shared.cache.cache import Cache
from shared.errors import EvaluationError
from shared.keys import is_heldout
from shared.recipe.recipe import Recipe, SideBySide
from tests.tiny_models import make_qwen3
from tests.tools.evaluate.heldout_cache import build_cache
from tools.evaluate import all_models
from tools.evaluate.one_model import evaluate_model
from tools.evaluate.results.run_shapes import SideRow, read_lines
from tools.evaluate.side_by_side.language import has_switched, languages_of
from tools.evaluate.side_by_side.side_figures import by_temperature, side_by_side_figures
from tools.evaluate.side_by_side.side_prompts import SidePrompt, choose_prompts
from tools.evaluate.side_by_side.structure import num_kept, structure_of
from tools.evaluate.side_by_side.terms import terms_of
from tools.report.figures import report_figures
from tools.report.run_files import read_run
from tools.report.samples import side_samples
from tools.report.tables import markdown, table_text


def kept_answers(out: Path, names: list[str]) -> dict[str, Any]:
    place = out / "evaluate" / "side_by_side"
    return {name: by_temperature(read_lines(place / f"{name}.answers.jsonl", SideRow)[0]) for name in names}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("side")
    build_cache(root / "cache", make_qwen3(root / "teacher"))
    make_qwen3(root / "student", seed=3)
    make_qwen3(root / "out" / "train" / "twin" / "model")  # the teacher's own weights
    rows = [{"question": f"{i} and {i}?", "answer": f"#### {2 * i}"} for i in range(400)]
    (root / "math.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "mine.jsonl").write_text('{"prompt": "Why?", "reference": "So."}\n{"prompt": "How?"}\n')
    return root


def recipe(root: Path, models: list[str] | None = None, **settings: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "output_dir": str(root / "out"),
            "teacher": {"model": str(root / "teacher"), "dtype": "float32"},
            "cache": str(root / "cache"),
            "student": {"model": str(root / "student")},
            "heldout": {"fraction": 0.7},
            "stages": [{"name": "twin", "losses": [{"name": "forward_kl"}]}],
            "evaluate": {
                "models": models or ["teacher", "base", "twin"],
                "engine": "transformers",
                "max_new_tokens": 12,
                "tasks": [{"name": "gsm8k", "path": str(root / "math.test.jsonl"), "limit": 3}],
                "side_by_side": settings,
            },
        }
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Run models in this process; return which parts of which model were done."""
    done: list[tuple[str, list[str]]] = []

    def run(recipe: Recipe, name: str, wanted: dict[str, Any], unsafe: bool, say: Any, *_: Any) -> None:
        done.append((name, list(wanted)))
        evaluate_model(recipe, name, wanted, unsafe, say)

    monkeypatch.setattr(all_models, "num_at_once", lambda recipe, models: 1)
    monkeypatch.setattr(all_models, "_evaluate", run)
    return done


def quiet(chosen: Recipe) -> dict[str, Any]:
    return all_models.evaluate_all(chosen, say=lambda line: None)


def test_quick_takes_ten_from_all_sources_in_turn_whatever_the_seed(root: Path) -> None:
    prompts = choose_prompts(recipe(root))
    assert len(prompts) == 10
    counts = Counter(prompt.label for prompt in prompts)
    assert len(counts) == 3
    assert max(counts.values()) - min(counts.values()) <= 1
    assert prompts == choose_prompts(recipe(root, seed=7))
    cache = Cache.open(root / "cache")
    rows = {cache[i].prompt: cache[i] for i in range(len(cache))}
    for prompt in prompts:
        row = rows[prompt.text]
        assert is_heldout(row.group_key, 0.7)
        assert list(prompt.token_ids or ()) == row.token_ids[: row.spans[-1][0]].tolist()


def test_larger_sizes_draw_at_random_by_the_seed_and_take_all_where_there_are_fewer(root: Path) -> None:
    def numbers(**settings: Any) -> list[str]:
        chosen = recipe(root, prompts=["tasks"], **settings)
        whole = chosen.evaluate.model_copy(
            update={"tasks": (chosen.evaluate.tasks[0].model_copy(update={"limit": None}),)}
        )
        return [prompt.place for prompt in choose_prompts(chosen.model_copy(update={"evaluate": whole}))]

    medium = numbers(size="medium")
    assert len(medium) == len(set(medium)) == 50
    assert medium == numbers(size="medium") != numbers(size="medium", seed=1)
    assert len(numbers(size="full")) == 350
    assert len(choose_prompts(recipe(root, size="full", prompts=["tasks"]))) == 3
    mine = choose_prompts(recipe(root, prompts=[str(root / "mine.jsonl"), "tasks"]))
    assert [(p.label, p.text, p.reference) for p in mine if p.label == "mine"] == [
        ("mine", "Why?", "So."),
        ("mine", "How?", ""),
    ]


@pytest.mark.slow
def test_every_model_answers_every_prompt_at_every_temperature_and_what_is_kept_is_reused(
    root: Path, here: list[tuple[str, list[str]]]
) -> None:
    shutil.rmtree(root / "out" / "evaluate", ignore_errors=True)
    chosen = recipe(root, temperatures=[0.1, 1.2])
    quiet(chosen)
    assert here == [(name, ["evaluation", "side_by_side"]) for name in ("teacher", "base", "twin")]
    answers = kept_answers(root / "out", ["teacher", "base", "twin"])
    assert list(answers) == ["teacher", "base", "twin"]
    assert all({at: len(rows) for at, rows in of.items()} == {"0.1": 10, "1.2": 10} for of in answers.values())
    figures = side_by_side_figures(answers)
    for temperature in ("0.1", "1.2"):
        twin, base = figures["twin"][temperature], figures["base"][temperature]
        assert twin["same_as_teacher"] == twin["length_kept"] == twin["terms_kept"] == 1.0
        assert twin["language_switched"] == 0.0
        assert (
            base["same_as_teacher"] < 1
            and base["same_as_base"] is None
            and figures["teacher"][temperature]["same_as_teacher"] is None
        )
        assert twin["same_as_base"] == base["same_as_teacher"]
    quiet(chosen)
    assert len(here) == 3
    before = (root / "out" / "evaluate" / "side_by_side" / "base.answers.jsonl").read_text()
    shutil.rmtree(root / "out" / "evaluate" / "side_by_side")
    quiet(chosen)
    assert here[3:] == [(name, ["side_by_side"]) for name in ("teacher", "base", "twin")]
    assert (root / "out" / "evaluate" / "side_by_side" / "base.answers.jsonl").read_text() == before
    for change in ({"seed": 1}, {"temperatures": [0.1]}, {"max_new_tokens": 5}, {"prompts": ["tasks"]}):
        num = len(here)
        quiet(recipe(root, ["base"], **{"temperatures": [0.1, 1.2], **change}))
        assert here[num:] == [("base", ["side_by_side"])]
    quiet(chosen)
    (root / "out" / "recipe.yaml").write_text(json.dumps(json.loads(chosen.model_dump_json())))
    run = read_run(root / "out")
    report = report_figures([run])
    assert report["models"]["twin"]["side_by_side"]["1.2"]["same_as_teacher"] == 1.0
    samples = side_samples(run)
    assert {sample.domain for sample in samples} == {"temperature 0.1", "temperature 1.2"}
    assert all(list(sample.answers) == ["teacher", "base", "twin"] for sample in samples)
    assert "Side by side at sampling temperatures" in markdown(report)
    assert "| 1.2 | twin |" in markdown(report)
    assert "same as teacher" in table_text(report)


@pytest.mark.slow
def test_identical_models_have_no_distance_and_equal_scores_and_a_second_evaluation_the_same_figures(
    root: Path, here: list[tuple[str, list[str]]]
) -> None:
    def figures() -> dict[str, Any]:
        shutil.rmtree(root / "out" / "evaluate", ignore_errors=True)
        results = quiet(recipe(root, temperatures=[0.7]))
        files = sorted((root / "out" / "evaluate").rglob("*.answers.jsonl"))
        return {
            "measured": {
                name: {part: result[part] for part in ("tasks", "heldout")} for name, result in results.items()
            },
            "answers": [path.read_text() for path in files],
            "side by side": side_by_side_figures(kept_answers(root / "out", list(results))),
        }

    first = figures()
    teacher, twin, base = (first["measured"][name] for name in ("teacher", "twin", "base"))
    assert twin == teacher
    assert abs(twin["heldout"]["kl_nats"]) < 3e-4  # what the codec rounds; base is a thousand times as far
    assert twin["heldout"]["top1_agreement"] == twin["heldout"]["top1_in_teacher_top5"] == 1.0
    assert base["heldout"]["kl_nats"] > 0.3
    assert len(first["answers"]) == 6
    assert figures() == first


def test_a_model_with_another_tokenizer_is_not_asked_the_caches_tokens(
    root: Path, here: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student_train.student.student.student_tokenizer_hash", lambda *_, **__: "another")
    with pytest.raises(EvaluationError, match=r"'teacher' has tokenizer another .*prompts: \[tasks\]"):
        quiet(recipe(root, ["teacher"], seed=99))


def test_prompts_that_do_not_exist_are_refused(root: Path) -> None:
    with pytest.raises(EvaluationError, match="No such file"):
        choose_prompts(recipe(root, prompts=["nothing.jsonl"]))
    (root / "bad.jsonl").write_text('{"question": "q"}\n')
    with pytest.raises(EvaluationError, match=r"bad\.jsonl:1: no prompt to answer: the column 'prompt' is missing"):
        choose_prompts(recipe(root, prompts=[str(root / "bad.jsonl")]))
    for settings, says in (
        ({"prompts": ["held out"]}, "neither 'heldout' nor 'tasks'"),
        ({"prompts": ["tasks", "tasks"]}, "listed twice"),
        ({"temperatures": []}, "at least 1"),
        ({"temperatures": [0.7, 0.7]}, "listed twice"),
        ({"size": "huge"}, "quick"),
    ):
        with pytest.raises(ValueError, match=says):
            SideBySide.model_validate(settings)
    plain = recipe(root).model_dump(mode="json")
    with pytest.raises(ValueError, match=r"nothing is held out at heldout\.fraction 0"):
        Recipe.model_validate({**plain, "heldout": {"fraction": 0}})
    with pytest.raises(ValueError, match="there are no `tasks`"):
        Recipe.model_validate({**plain, "evaluate": {"side_by_side": {"prompts": ["tasks"]}}})


def test_terms_are_identifiers_units_names_and_uncommon_words() -> None:
    answers = [
        "Then `max_len` of nodeA is 12 % above 512 MB, says Dora on db-host and node7.",
        "The service was restarted.",
        "the service",
    ]
    assert terms_of(answers)[0] == {"max_len", "nodea", "12 %", "512 mb", "dora", "node7"}
    assert terms_of(answers)[1] == {"restarted"}
    figures = side_by_side_figures({"teacher": side(["Use 512 MB on node7."]), "kd": side(["use 512  mb on node71"])})
    assert figures["kd"]["1"]["terms_kept"] == 0.5


def side(
    texts: list[str], prompt: str = "What is the state of it, and what was it?"
) -> dict[str, dict[int, dict[str, Any]]]:
    rows = {
        number: {"prompt": prompt, "answer": text, "tokens": len(text), "truncated": False}
        for number, text in enumerate(texts)
    }
    return {"1": rows}


def test_structure_is_counted_by_kind_and_kept_up_to_the_teachers_count() -> None:
    text = (
        "# Plan\n1. one\n2) two\nStep 3: three\n- a\n* b\n```python\n# no heading\n- no item\n```\n**Then**\n```\nopen"
    )
    wanted = structure_of(text)
    assert wanted == Counter(steps=3, items=2, code=2, headings=2)
    assert num_kept(wanted, "1. a\n2. b\n3. c\n4. d\n5. e") == 3
    figures = side_by_side_figures({"teacher": side([text, "plain"]), "kd": side(["1. a\n- b\n- c\n- d", "1. more"])})
    assert figures["kd"]["1"]["structure_kept"] == pytest.approx(3 / 9)
    assert side_by_side_figures({"teacher": side(["plain"]), "kd": side(["1. x"])})["kd"]["1"]["structure_kept"] is None


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("The answer is that it was there.", {"en"}),
        ("Die Antwort ist nicht mit dem Server und der Platte", {"de"}),
        ("答案是四十二，因为磁盘已满。", {"han"}),
        ("Ответ: диск полон", {"cyrillic"}),
        ("42", set()),
        ("```python\ndef der_die_das_und_ist(): return 'nicht mit dem'\n```\n42", set()),
        ("restart nginx", {"latin"}),
    ],
)
def test_languages(text: str, languages: set[str]) -> None:
    assert languages_of(text) == languages


def test_a_switch_is_a_language_that_neither_prompt_nor_teacher_uses() -> None:
    english, german = "The disk is full and it was not for you.", "Die Platte ist voll und das ist nicht gut."
    assert has_switched("The disk 磁盘已经满了 is full.", languages_of(english))
    assert has_switched(german, languages_of(english))
    assert not has_switched("restart nginx", languages_of(english))
    assert not has_switched("x = 42", frozenset())
    figures = side_by_side_figures(
        {"teacher": side([german, english]), "kd": side([german, german]), "base": side(["", "满"])}
    )
    assert figures["kd"]["1"]["language_switched"] == 0.5
    assert figures["base"]["1"]["language_switched"] == 0.0  # one character is too few to be a language
    alone = side_by_side_figures({"kd": side([german, english])})
    assert alone["kd"]["1"]["language_switched"] == 0.5
    assert alone["kd"]["1"]["terms_kept"] is None


def test_answers_to_other_prompts_are_never_compared() -> None:
    figures = side_by_side_figures({"teacher": side(["a", "b"]), "kd": side(["a", "b"], prompt="another")})
    assert figures == {}
    shorter = side_by_side_figures({"teacher": side(["a", "b"]), "kd": side(["a"])})
    assert shorter["kd"]["1"] | {"answers": 1, "same_as_teacher": 1.0} == shorter["kd"]["1"]


def test_prompts_are_values() -> None:
    assert SidePrompt("a", "b", "c", "d", (1,)) == SidePrompt("a", "b", "c", "d", (1,))
