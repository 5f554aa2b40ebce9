"""Which processes train the stages of a recipe with rounds."""

from __future__ import annotations

import pytest

from shared.recipe.recipe import Recipe
from tools.rounds import chain, finished

STAGE = {"losses": [{"name": "forward_kl"}], "trainer": {"max_steps": 4}}
PLAIN = [{"name": name, "init_from": "base", **STAGE} for name in ("sft", "kd", "more")]
ROUNDS = {"name": "own", "init_from": "kd", "rounds": {"count": 2}, **STAGE}


@pytest.fixture
def begun(monkeypatch):
    found: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(chain, "run_phase", lambda phase, command, output: found.append((phase, command[5:])))
    return found


@pytest.mark.parametrize(
    ("done", "trained"),
    [
        ((), ["train sft, kd, more", "train last"]),
        (("sft",), ["train kd, more", "train last"]),
        (("sft", "more"), ["train kd, more", "train last"]),  # kd's weights will be others, and more begins with them
        (("sft", "kd", "more", "last"), []),
    ],
)
def test_plain_stages_that_follow_each_other_share_a_process(begun, monkeypatch, tmp_path, done, trained):
    last = {"name": "last", "init_from": "own", **STAGE}
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "output_dir": str(tmp_path / "run"),
            "cache": str(tmp_path / "cache"),
            "teacher": {"model": "t"},
            "student": {"model": "s"},
            "prompts": [{"source": "math", "path": "p.jsonl", "format": "messages"}],
            "generate": {},
            "stages": [*PLAIN, ROUNDS, last],
        }
    )
    monkeypatch.setattr(finished, "is_finished", lambda recipe, stage: stage.name in done)
    chain.train_in_processes(recipe, recipe.stages, ["r.yaml", "--checked"])
    rounds = [f"round {number} of own, {step}" for number in (1, 2) for step in ("answer", "score", "train")]
    assert [phase for phase, _ in begun] == [*trained[:1], *rounds, *trained[1:]]
    for phase, words in begun:
        if phase.startswith("train"):
            names = phase.removeprefix("train ").split(", ")
            assert words == ["r.yaml", "--checked", "--from-stage", names[0], "--to-stage", names[-1]]
