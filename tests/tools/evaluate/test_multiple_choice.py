"""Multiple choice: published rows, and likelihoods against dense float64 maths, choice by choice and without any
batching.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from transformers import AutoTokenizer

from shared.errors import EngineError, EvaluationError
from shared.recipe.recipe import Recipe, Task
from shared.recipe.sections.evaluation import TaskName
from teacher_cache.engines.vllm.vllm_version import installed_vllm
from tests.tiny_models import make_llama, make_qwen3, make_tokenizer, spoil
from tests.tools.evaluate.heldout_cache import dense_logprobs
from tools.evaluate.all_models import evaluate_all
from tools.evaluate.models.models import model_under_test
from tools.evaluate.models.rendering import render, source_of
from tools.evaluate.one_model import evaluate_model
from tools.evaluate.results.results import evaluation_identity
from tools.evaluate.results.run_shapes import AnswerRow, read_lines
from tools.evaluate.tasks import multiple_choice
from tools.evaluate.tasks.questions import Question, read_questions
from tools.evaluate.tasks.registry import task_kind

PUBMEDQA = Path(__file__).parents[4] / "shared" / "data" / "pubmedqa" / "ori_pqal.json"
ROWS = [
    {"question": "Which of them leaves?", "choices": ["The train to the disk", "node 7", " Anna "], "answer": 1},
    {
        "question": "How many apples?",
        "choices": ["7", "seven apples are left", "none"],
        "answer": "seven apples are left",
    },
    {"question": "Restart?", "choices": ["no", "yes, restart the service"], "answer": "B"},
    {"question": "And now?", "choices": ["no", "yes"], "answer": "A"},
]


def questions_of(path: Path, **settings: Any) -> list[Question]:
    task = Task.model_validate({"name": "multiple_choice", "path": str(path), **settings})
    return read_questions(task, task_kind(task))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(root: Path, **task: Any) -> Recipe:
    tasks = [{"name": "multiple_choice", "path": str(root / "choice.jsonl"), "domain": "choice", **task}]
    return Recipe.model_validate(
        {
            "name": "x",
            "output_dir": str(root / "out"),
            "cache": str(root / "cache"),
            "teacher": {"model": str(root / "model"), "dtype": "float32"},
            "heldout": {"fraction": 0},
            "evaluate": {"models": ["teacher"], "engine": "transformers", "tasks": tasks},
        }
    )


@pytest.mark.skipif(not PUBMEDQA.exists(), reason="the published PubMedQA data is not beside the checkout")
def test_published_pubmedqa_scores_all_right_with_its_own_decisions_and_none_with_others() -> None:
    questions = questions_of(PUBMEDQA)
    assert len(questions) == 1000
    assert questions[0].prompt.startswith("Abstract: Programmed cell death (PCD) is")
    assert questions[0].prompt.endswith(
        "\nQuestion: Do mitochondria play a role in remodelling lace plant leaves during programmed cell "
        "death?\nAnswer:"
    )
    assert {q.reference for q in questions} == {"yes", "no", "maybe"}
    assert all(score.value == 1 for score in multiple_choice.score_answers([(q, q.reference) for q in questions]))
    wrong = [(q, text) for q in questions for text in ("yes", "no", "maybe") if text != q.reference]
    assert not any(score.value for score in multiple_choice.score_answers(wrong))


def test_answers_are_numbers_texts_or_letters(tmp_path: Path) -> None:
    questions = questions_of(write(tmp_path / "a.jsonl", ROWS))
    assert [q.reference for q in questions] == ["node 7", "seven apples are left", "yes, restart the service", "no"]
    (tmp_path / "b.json").write_text(json.dumps({str(900 + i): row for i, row in enumerate(ROWS)}))
    (tmp_path / "c.json").write_text(json.dumps(ROWS))
    for name in ("b.json", "c.json"):
        again = questions_of(tmp_path / name)
        assert [(q.prompt, q.reference) for q in again] == [(q.prompt, q.reference) for q in questions]
        assert again[2].place == f"{tmp_path / name}:3"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "'answer' is 2, expected a number from 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "'answer' is True"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "'answer' is 'C'"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least two texts"),
        ({"question": "q", "choices": ["a", "a "], "answer": 0}, "names one choice twice"),
        ({"choices": ["a", "b"], "answer": 0}, "'question' is missing"),
        ({"QUESTION": "q", "CONTEXTS": ["c"], "final_decision": "never"}, "'final_decision' is 'never'"),
        ({"QUESTION": "q", "CONTEXTS": "c", "final_decision": "yes"}, "'CONTEXTS' is 'c'"),
    ],
)
def test_a_row_that_is_no_multiple_choice_is_named(tmp_path: Path, row: dict, says: str) -> None:
    path = write(tmp_path / "bad.jsonl", [ROWS[0], row])
    with pytest.raises(EvaluationError) as caught:
        questions_of(path)
    assert f"{path}:2" in str(caught.value)
    assert says in str(caught.value)


def test_json_that_is_no_set_of_rows_is_refused(tmp_path: Path) -> None:
    for text, says in (("3", "a list of rows"), ("[3]", "expected a JSON object, found 3"), ("[", "a list of rows")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(EvaluationError, match=says):
            questions_of(tmp_path / "a.json")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("choice")
    make_qwen3(root / "model")
    write(root / "choice.jsonl", ROWS)
    return root


def evaluated(chosen: Recipe) -> dict[str, Any]:
    identity = evaluation_identity(chosen, model_under_test(chosen, "teacher"))
    evaluate_model(chosen, "teacher", {"evaluation": identity}, False, lambda line: None)
    return json.loads((chosen.output_dir / "evaluate" / "teacher.json").read_text())["tasks"]["choice"]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("shots", [0, 1])
def test_likelihoods_equal_dense_float64_maths(
    root: Path, plain: bool, shots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(root, shots=shots, prompt_template="{prompt}\nAnswer:")
    if plain:
        monkeypatch.setattr(
            "tools.evaluate.asking.load_fast_tokenizer",
            lambda *_, **__: make_tokenizer(root / "plain", chat_template=None),
        )
    found = evaluated(chosen)
    answers = read_lines(root / "out" / "evaluate" / "teacher.answers.jsonl", AnswerRow)[0]
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    right = {"by_sum": 0, "by_token": 0, "by_byte": 0}
    for row, answer in zip(ROWS[shots:], answers, strict=True):
        turns = [*ROWS[:shots], row]
        joint = "\n" if plain else ""
        prompts = [f"{turn['question']}\nAnswer:" for turn in turns]
        if plain:
            before = "\n\n".join([*(f"{p} {'node 7'}" for p in prompts[:-1]), prompts[-1]])
            joint = " "
        else:
            before = "".join(
                f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\nnode 7<|im_end|>\n" for p in prompts[:-1]
            )
            before += f"<|im_start|>user\n{prompts[-1]}<|im_end|>\n<|im_start|>assistant\n"
        start = tokenizer(before)["input_ids"]
        sums, tokens, texts = [], [], [text.strip() for text in row["choices"]]
        for text in texts:
            ids = tokenizer(joint + text)["input_ids"]
            logprobs = dense_logprobs(root / "model", np.array([*start, *ids]))
            sums.append(sum(logprobs[len(start) + i - 1, token] for i, token in enumerate(ids)))
            tokens.append(len(ids))
        assert [choice["logprob_nats"] for choice in answer["choices"]] == pytest.approx(sums, rel=1e-4)
        assert answer["answer"] == texts[int(np.argmax(sums))]
        lengths = {"by_sum": [1] * len(texts), "by_token": tokens, "by_byte": [len(text.encode()) for text in texts]}
        for name, length in lengths.items():
            right[name] += texts[int(np.argmax(np.array(sums) / length))] == answer["reference"]
    num = len(ROWS) - shots
    assert found["score"] == pytest.approx(right["by_sum"] / num)
    assert found["extra"] == {name: pytest.approx(right[name] / num) for name in ("by_token", "by_byte")}
    assert found["num_questions"] == num


def test_a_model_evaluated_twice_gives_the_same_figures(root: Path) -> None:
    first = evaluated(recipe(root))
    text = (root / "out" / "evaluate" / "teacher.answers.jsonl").read_text()
    assert evaluated(recipe(root)) == first
    assert (root / "out" / "evaluate" / "teacher.answers.jsonl").read_text() == text


def test_settings_that_sample_are_refused() -> None:
    for key, value in (("temperature", 0.5), ("seed", 3), ("samples", 2)):
        with pytest.raises(ValueError, match="samples no answer"):
            Task.model_validate({"name": "multiple_choice", "path": "a.jsonl", key: value})


def test_shots_that_leave_no_room_are_refused(root: Path) -> None:
    long = {**ROWS[0], "question": "why " * 400}
    write(root / "long.jsonl", [long, ROWS[1]])
    chosen = recipe(root, shots=1, path=str(root / "long.jsonl"))
    with pytest.raises(
        EvaluationError, match=r"long\.jsonl:2: the question has \d+ tokens and a choice has .* fewer shots"
    ):
        evaluated(chosen)


TASK_ROWS: dict[str, dict] = {
    "gsm8k": {"question": "Ask {}?", "answer": "Solved {} #### 1"},
    "keywords": {"prompt": "Ask {}?", "keywords": ["x"], "reference": "Solved {}"},
    "humaneval": {
        "prompt": "Ask {}?",
        "entry_point": "f",
        "canonical_solution": "    Solved {}\n",
        "test": "def check(f): pass",
    },
    "multiple_choice": {"question": "Ask {}?", "choices": ["Solved {}", "no"], "answer": 0},
    "copying": {"prompt": "Ask {}? It is x{}x.", "value": "x{}x", "reference": "Solved {}"},
}


@pytest.mark.parametrize("name", get_args(TaskName))
@pytest.mark.parametrize("template", ["chat", None])
def test_shots_of_every_task_stand_before_its_questions(
    root: Path, tmp_path: Path, name: str, template: str | None
) -> None:
    tokenizer = make_tokenizer(tmp_path / "t", **({} if template else {"chat_template": None}))
    rows = [json.loads(json.dumps(TASK_ROWS[name]).replace("{}", str(number))) for number in range(4)]
    path = write(tmp_path / "rows.jsonl", rows)
    task = Task.model_validate({"name": name, "path": str(path), "shots": 2})
    questions = read_questions(task, task_kind(task))
    assert len(questions) == 2
    texts = [tokenizer.decode(ids) for ids in render(tokenizer, source_of(recipe(root), task), questions)]
    for number, text in enumerate(texts, start=2):
        places = [text.index(part) for part in ("Ask 0?", "Solved 0", "Ask 1?", "Solved 1", f"Ask {number}?")]
        assert places == sorted(places)
        assert "Solved 2" not in text


@pytest.mark.slow
def test_vllm_weighs_choices_as_transformers_does_and_answers_in_the_same_start(root: Path) -> None:
    if installed_vllm() is None:
        pytest.skip("vLLM is not installed")
    plain = recipe(root)
    sums = {"name": "gsm8k", "path": str(root / "sums.jsonl")}
    write(root / "sums.jsonl", [{"question": f"{i} and {i}?", "answer": f"#### {2 * i}"} for i in range(3)])
    tasks = [*plain.model_dump(mode="json")["evaluate"]["tasks"], sums]
    weighed = {}
    for engine in ("transformers", "vllm"):
        settings = {"models": ["teacher"], "engine": engine, "max_new_tokens": 8, "tasks": tasks}
        chosen = Recipe.model_validate(
            {**plain.model_dump(mode="json"), "output_dir": str(root / engine), "evaluate": settings}
        )
        evaluate_all(chosen, say=lambda line: None)
        rows = read_lines(root / engine / "evaluate" / "teacher.answers.jsonl", AnswerRow)[0]
        assert [row["domain"] for row in rows] == ["choice"] * 4 + ["sums"] * 3
        weighed[engine] = [choice["logprob_nats"] for row in rows[:4] for choice in row["choices"]]
        result = json.loads((root / engine / "evaluate" / "teacher.json").read_text())
        assert result["provenance"]["engine"] == engine
    assert weighed["vllm"] == pytest.approx(weighed["transformers"], rel=1e-3, abs=1e-2)


def test_choices_of_a_model_that_computes_nan_are_refused(tmp_path: Path) -> None:
    """The first choice would win wherever NaN was compared."""
    write(tmp_path / "choice.jsonl", ROWS)
    tokenizer = AutoTokenizer.from_pretrained(make_llama(tmp_path / "model"))
    spoil(tmp_path / "model", tokenizer("node 7")["input_ids"][-1])
    with pytest.raises(EngineError, match="computes NaN instead of numbers"):
        evaluated(recipe(tmp_path))
