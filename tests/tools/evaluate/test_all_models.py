"""Every model of a recipe end to end with tiny models, and what is reused, refused and left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.atomic import write_atomic
from shared.cache.cache import Cache
from shared.cache.tokenizer_files import read_tokenizer_files
from shared.cache.writing.cache_writer import CacheWriter
from shared.cache.writing.layer_writer import LayerWriter
from shared.errors import DecantError, EvaluationError
from shared.recipe.recipe import Recipe
from shared.recipe.sections.capture import TopCapture
from teacher_cache.engines.protocol import Generated
from teacher_cache.teacher.model_files import ModelFiles
from tests.tiny_models import make_qwen3
from tests.tools.evaluate.heldout_cache import build_cache
from tools.evaluate import all_models, one_model
from tools.evaluate.models import generate_answers
from tools.evaluate.models.models import ModelUnderTest, model_under_test
from tools.evaluate.one_model import evaluate_model
from tools.evaluate.results import results
from tools.evaluate.results.results import evaluation_identity, heldout_layer, same_identity
from tools.evaluate.results.run_shapes import AnswerRow, read_lines

CODE = {
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "test": "def check(f):\n    assert f(1) == 1\n",
}
ROWS = {
    "math": ("gsm8k", [{"question": f"{i} and {i}?", "answer": f"#### {2 * i}"} for i in range(5)]),
    "code": ("humaneval", [{"task_id": f"t/{i}", **CODE} for i in range(3)]),
    "aiops": ("keywords", [{"prompt": "why?", "keywords": ["disk", "full"], "reference": "disk full"}] * 2),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("side")
    build_cache(root / "cache", make_qwen3(root / "teacher"))
    make_qwen3(root / "student", seed=3)
    make_qwen3(root / "out" / "train" / "kd" / "model", seed=4)
    for domain, (_, rows) in ROWS.items():
        (root / f"{domain}.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def recipe(root: Path, **evaluate: Any) -> Recipe:
    tasks = [{"name": name, "path": str(root / f"{domain}.test.jsonl")} for domain, (name, _) in ROWS.items()]
    settings = {
        "models": ["teacher", "base", "kd"],
        "engine": "transformers",
        "max_new_tokens": 8,
        "tasks": tasks,
        **evaluate,
    }
    return Recipe.model_validate(
        {
            "name": "x",
            "output_dir": str(root / "out"),
            "teacher": {"model": str(root / "teacher"), "dtype": "float32"},
            "cache": str(root / "cache"),
            "student": {"model": str(root / "student")},
            "heldout": {"fraction": 0.4},
            "stages": [
                {"name": "kd", "losses": [{"name": "forward_kl"}]},
                {"name": "later", "losses": [{"name": "forward_kl"}]},
            ],
            "evaluate": settings,
        }
    )


class CannedEngine:
    """Answers every question with the same text, in an odd order."""

    text = "It is full.\n#### 4"
    opened: list[Any] = []  # noqa: RUF012 - what tests look at

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def generate(self, requests: Any, settings: Any) -> Any:
        for request in sorted(requests, key=lambda request: request.seed):
            yield Generated(request.tag, self.tokenizer(self.text)["input_ids"], "length")

    def provenance(self) -> dict[str, Any]:
        return {"engine": "canned"}

    def close(self) -> None:
        self.opened.append("closed")


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[Any]:
    """Put a canned engine in place of a real one, and run models in this process; return what was opened and closed."""
    from transformers import AutoTokenizer

    import teacher_cache.engines

    CannedEngine.opened = []

    def open_engine(teacher: Any, capture: Any, **_: Any) -> CannedEngine:
        CannedEngine.opened.append(teacher)
        return CannedEngine(AutoTokenizer.from_pretrained(teacher.model))

    monkeypatch.setattr(teacher_cache.engines, "open_engine", open_engine)
    monkeypatch.setattr(all_models, "num_at_once", lambda recipe, models: 1)
    monkeypatch.setattr(all_models, "_evaluate", lambda *given: evaluate_model(*given[:5]))
    for path in (root / "out" / "evaluate").glob("*"):
        path.unlink()
    return CannedEngine.opened


@pytest.mark.parametrize("changes, why", [
    ({"quantization": "fp8"}, "only 'vllm' has `quantization`"),
    ({"tensor_parallel_size": 2}, "only 'vllm' has `tensor_parallel_size`"),
    ({"max_num_batched_tokens": 512, "batch_tokens": 64}, None),
])  # fmt: skip
def test_settings_of_the_teacher_reach_the_engine_that_answers_or_are_refused(tmp_path, changes, why):
    data = {"name": "x", "output_dir": "o", "cache": "c", "teacher": {"model": "t", **changes}}
    chosen = Recipe.model_validate({**data, "evaluate": {"models": ["teacher"], "engine": "transformers"}})
    teacher = ModelUnderTest(
        "teacher", ModelFiles("t", tmp_path, None, {}), None, "float32", chosen.teacher.quantization, False
    )
    if why is not None:
        with pytest.raises(EvaluationError, match=f"cannot load 'teacher': {why}"):
            teacher.settings(chosen, 64)
    else:
        section = teacher.settings(chosen, 64)
        assert (section.engine, section.max_num_batched_tokens, section.batch_tokens) == ("transformers", 512, 256)


def test_answers_are_scored_beside_their_questions_and_kept(root: Path, canned: list[Any]) -> None:
    chosen = recipe(root, models=["kd"])
    result = all_models.evaluate_all(chosen, say=lambda line: None)["kd"]
    scores = {domain: task["score"] for domain, task in result["tasks"].items()}
    assert scores == {"math": 0.2, "code": 0.0, "aiops": 0.5}
    assert result["heldout"]["kl_nats"] > 0
    answers = read_lines(root / "out" / "evaluate" / "kd.answers.jsonl", AnswerRow)[0]
    assert [row["score"] for row in answers if row["domain"] == "math"] == [0, 0, 1, 0, 0]
    assert answers[0]["answer"] == CannedEngine.text
    assert all(row["truncated"] for row in answers)
    assert canned[0].engine == "transformers"
    assert canned[0].model == str(root / "out" / "train" / "kd" / "model")
    assert canned[-1] == "closed"


@pytest.mark.parametrize("place", ["heldout", "result"])
def test_answers_of_an_evaluation_that_was_killed_never_stay_beside_the_figures_of_another(
    root: Path, canned: list[Any], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    first, answers = recipe(root, models=["kd"]), root / "out" / "evaluate" / "kd.answers.jsonl"
    all_models.evaluate_all(first, say=lambda line: None)
    kept = answers.read_bytes()

    def end(*given: Any, **more: Any) -> None:
        if place == "heldout" or given[2] == "evaluation":
            raise KeyboardInterrupt
        write_atomic(*given, **more)

    with monkeypatch.context() as other:
        other.setattr(CannedEngine, "text", "#### 2")
        other.setattr(*((one_model, "_heldout") if place == "heldout" else (results, "write_atomic")), end)
        with pytest.raises(KeyboardInterrupt):
            all_models.evaluate_all(recipe(root, models=["kd"], max_new_tokens=9), say=lambda line: None)
    all_models.evaluate_all(first, say=lambda line: None)
    assert answers.read_bytes() == kept


def test_a_cache_of_two_teachers_is_evaluated_on_the_layer_of_the_recipes_own(
    root: Path, canned: list[Any], tmp_path: Path
) -> None:
    place = Path(shutil.copytree(root / "cache", tmp_path / "cache"))
    cache = Cache.open(place)
    rows = [cache[index] for index in range(len(cache))]
    writer = CacheWriter.create_or_open(place, cache.sequences_identity, read_tokenizer_files(place))
    assert cache.layer is not None
    other = LayerWriter.create_or_open(
        writer, "other", replace(cache.layer, teacher="other", weights_hash="0" * 32), {}
    )
    targets = [row.targets for row in rows if row.targets is not None]
    other.write("part-00000000-000000", [row.key for row in rows], targets, {})
    chosen = recipe(root, models=["kd"]).model_copy(update={"cache": (place,), "capture": TopCapture(k=cache.layer.k)})
    found = all_models.evaluate_all(chosen, say=lambda line: None)["kd"]["heldout"]
    assert found["layer"] == cache.layer_name


@pytest.mark.slow
def test_only_what_changed_is_evaluated_again(root: Path, canned: list[Any]) -> None:
    said: list[str] = []
    chosen = recipe(root, models=["base", "kd"])
    all_models.evaluate_all(chosen, say=said.append)
    seconds = json.loads((root / "out" / "seconds.json").read_text())
    assert len(canned) == 4
    all_models.evaluate_all(chosen, say=said.append)
    assert len(canned) == 4
    assert {"reused evaluation of base", "reused evaluation of kd"} <= set(said)
    assert json.loads((root / "out" / "seconds.json").read_text()) == seconds
    make_qwen3(root / "out" / "train" / "kd" / "model", seed=5)
    all_models.evaluate_all(chosen, say=said.append)
    assert len(canned) == 6
    all_models.evaluate_all(recipe(root, models=["base", "kd"], max_new_tokens=9), say=said.append)
    assert len(canned) == 10
    (root / "out" / "evaluate" / "base.json").write_text("{")
    all_models.evaluate_all(recipe(root, models=["base", "kd"], max_new_tokens=9), say=said.append)
    assert len(canned) == 12


def test_identity_follows_every_input(root: Path) -> None:
    def identity(chosen: Recipe) -> dict[str, Any]:
        return evaluation_identity(chosen, model_under_test(chosen, "base"))

    first = identity(recipe(root))
    assert same_identity(json.loads(json.dumps(first)), identity(recipe(root)))
    task = {"name": "gsm8k", "path": str(root / "math.test.jsonl")}
    changed = [
        {"max_new_tokens": 9},
        {"heldout_rows": 3},
        {"tasks": [task]},
        {"tasks": [{**task, "limit": 2}]},
        {"engine": "vllm"},
    ]
    identities = [json.dumps(identity(recipe(root, **change)), sort_keys=True) for change in changed]
    assert len({json.dumps(first, sort_keys=True), *identities}) == len(changed) + 1
    text = (root / "math.test.jsonl").read_text()
    (root / "moved").mkdir()
    moved = {**task, "path": str(root / "moved" / "math.test.jsonl")}
    (root / "moved" / "math.test.jsonl").write_text(text)
    assert same_identity(identity(recipe(root, tasks=[task])), identity(recipe(root, tasks=[moved])))
    (root / "math.test.jsonl").write_text(text + "\n")
    assert not same_identity(identity(recipe(root, tasks=[task])), identity(recipe(root, tasks=[moved])))
    assert not same_identity(first, identity(recipe(root)))
    (root / "math.test.jsonl").write_text(text)


def test_samples_have_seeds_of_their_own_and_scores_are_means(
    root: Path, canned: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    original = CannedEngine.generate

    def watched(self: CannedEngine, requests: Any, settings: Any) -> Any:
        requests = list(requests)
        seeds.extend(request.seed for request in requests)
        assert settings.temperature == 0.7
        return original(self, requests, settings)

    monkeypatch.setattr(CannedEngine, "generate", watched)
    task = {"name": "gsm8k", "path": str(root / "math.test.jsonl"), "samples": 3, "temperature": 0.7}
    result = all_models.evaluate_all(recipe(root, models=["kd"], tasks=[task]), say=lambda line: None)["kd"]
    assert len(set(seeds)) == len(seeds) == 15
    assert result["tasks"]["math"]["score"] == pytest.approx(0.2)
    assert result["tasks"]["math"]["num_questions"] == 5


def test_what_cannot_be_evaluated_is_refused_before_any_model_starts(root: Path, canned: list[Any]) -> None:
    wrong: list[tuple[Recipe, str]] = [
        (recipe(root, models=["later"]), "run `decant train` first"),
        (recipe(root, models=[]), "names no model"),
        (recipe(root, tasks=[{"name": "gsm8k", "path": str(root / "none.jsonl")}]), "No such file"),
        (
            recipe(root, tasks=[{"name": "multiple_choice", "path": str(root / "math.test.jsonl")}]),
            "the column 'choices' is None",
        ),
    ]
    for chosen, says in wrong:
        with pytest.raises(EvaluationError, match=says):
            all_models.evaluate_all(chosen, say=lambda line: None)
    random = recipe(root, models=["base"])
    random = random.model_copy(update={"student": random.student.model_copy(update={"init": "random"})})
    with pytest.raises(EvaluationError, match="random weights"):
        all_models.evaluate_all(random, say=lambda line: None)
    assert canned == []


def test_a_question_longer_than_the_model_is_named(root: Path, canned: list[Any]) -> None:
    with pytest.raises(EvaluationError, match=r"code\.test\.jsonl:\d: the question has 17 tokens .* 512 together"):
        all_models.evaluate_all(recipe(root, models=["kd"], max_new_tokens=500), say=lambda line: None)


def test_thoughts_are_kept_but_not_scored() -> None:
    answer = generate_answers.Answer("<think>#### 5</think>#### 4", 9, False)
    assert answer.final == "#### 4"
    assert generate_answers.Answer("#### 4", 1, False).final == "#### 4"


@pytest.mark.slow
def test_real_models_in_processes_of_their_own(root: Path) -> None:
    said: list[str] = []
    results = all_models.evaluate_all(recipe(root), say=said.append)
    assert list(results) == ["teacher", "base", "kd"]
    assert results["teacher"]["heldout"]["kl_nats"] < 1e-3 < results["base"]["heldout"]["kl_nats"]
    assert json.loads((root / "out" / "seconds.json").read_text())["evaluate"] > 0
    assert any("held-out rows" in line for line in said)


@pytest.mark.slow
def test_an_error_in_a_models_process_is_one_sentence_here(root: Path) -> None:
    with pytest.raises(DecantError, match=r"'kd' cannot be evaluated: .*512"):
        all_models.evaluate_all(recipe(root, models=["kd"], max_new_tokens=500), say=lambda line: None)


@pytest.mark.slow
def test_a_models_process_dies_with_its_parent(root: Path, tmp_path: Path) -> None:
    chosen = recipe(root, models=["kd"], max_new_tokens=400)
    (tmp_path / "recipe.json").write_text(chosen.model_dump_json())
    code = (
        "import sys; from shared.recipe.recipe import Recipe; from tools.evaluate.all_models import evaluate_all\n"
        "evaluate_all(Recipe.model_validate_json(open(sys.argv[1]).read()))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "recipe.json")], cwd=Path(all_models.__file__).parents[2]
    )

    def descendants() -> list[int]:
        """The process that is forked, and the model's that was forked from it."""
        parents = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except OSError:
                    continue
        children = [pid for pid, starter in parents.items() if starter == parent.pid]
        return children + [pid for pid, starter in parents.items() if starter in children]

    deadline = time.monotonic() + 120
    while len(found := descendants()) < 2 and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(found) >= 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in found if Path(f"/proc/{pid}").exists()]


def test_stage_is_measured_on_the_layer_that_it_learns_from(root: Path) -> None:
    """An `sft` stage learns from no layer: it is measured where the first stage that names one is."""
    document = recipe(root).model_dump(mode="json")
    losses = {"kl": [{"name": "forward_kl"}], "ce": [{"name": "cross_entropy"}]}
    document["stages"] = [
        {"name": "sft", "losses": losses["ce"]},
        {"name": "wide", "losses": losses["kl"], "targets": "wide"},
        {"name": "narrow", "losses": losses["kl"], "targets": "narrow"},
        {"name": "captured", "losses": losses["kl"]},
    ]
    document["evaluate"] |= {"models": ["teacher"]}
    document["capture"] = {"k": 16}
    staged = Recipe.model_validate(document)
    found = {model: heldout_layer(staged, model) for model in ("teacher", "base", "sft", "wide", "narrow", "captured")}
    own = Cache.open(root / "cache").layer_name
    everyone = dict.fromkeys(("teacher", "base", "sft", "wide"), "wide")
    assert found == everyone | {"narrow": "narrow", "captured": own}
    assert heldout_layer(recipe(root), "kd") == heldout_layer(recipe(root))


def test_identity_of_a_teacher_names_the_type_where_it_is_not_float32(root: Path, tmp_path: Path) -> None:
    before = evaluation_identity(recipe(root), model_under_test(recipe(root), "teacher"))
    assert "dtype" not in before["heldout"]
    narrow = recipe(root).model_copy(
        update={"cache": (build_cache(tmp_path / "narrow", root / "teacher", dtype="bfloat16"),)}
    )
    named = {name: evaluation_identity(narrow, model_under_test(narrow, name))["heldout"] for name in ("teacher", "kd")}
    assert named["teacher"]["dtype"] == "bfloat16" and "dtype" not in named["kd"]
