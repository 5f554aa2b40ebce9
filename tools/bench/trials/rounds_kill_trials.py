"""`python -m tools.bench.trials.rounds_kill_trials --kills 30`: steps killed with SIGKILL, continued, compared.

Two rounds of a tiny recipe are left alone, and what stood before and after each of their steps is kept. Then a step
begins again from what stood before it, is killed from outside after a randomly drawn share of the time that it takes,
up to three times, and is at last left to finish. Answers, targets and weights must be those of the run that was left
alone: rows and targets value by value, weights, metrics and the teacher's cache byte for byte.
Cost: two or three short steps per kill, in processes forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from shared.cache.cache import Cache
from shared.errors import UsageError
from tools.bench.benchmarks_page import measured_by, replace_section, table
from tools.bench.trials.forked import Forked

STEPS = ("answer", "score", "train")
ROUNDS = 2
MOST_KILLS = 3
"""Of one step, one after another."""


def recipe_of(teacher: Path, student: Path, prompts: Path, directory: Path) -> dict[str, Any]:
    """Return a recipe of one stage with rounds, which begin with the student's own weights, as plain data."""
    trainer = {"max_steps": 6, "pack_tokens": 256, "save_steps": 2, "learning_rate": 3e-3, "report_to": "none"}
    return {
        "name": "kills",
        "output_dir": str(directory / "run"),
        "teacher": {"model": str(teacher), "engine": "transformers", "dtype": "float32", "max_model_len": 256},
        "prompts": [{"source": "math", "path": str(prompts), "format": "messages", "limit": 40}],
        "generate": {"max_new_tokens": 16},
        "capture": {"mode": "top+sample", "k": 8, "draws": 4},
        "cache": str(directory / "cache"),
        "rows_per_part": 4,
        "heldout": {"fraction": 0.1},
        "student": {"model": str(student)},
        "stages": [
            {
                "name": "own",
                "losses": [{"name": "forward_kl"}],
                "trainer": trainer,
                "rounds": {
                    "count": ROUNDS,
                    "prompts": 0.3,
                    "max_new_tokens": 16,
                    "guards": {"cut": 1.0, "repeating": 1.0, "shortest": 0.0, "longest": 1000.0},
                },
            }
        ],
    }


def outcome(directory: Path) -> dict[str, Any]:
    """Return what must not depend on kills: rows and targets by key, bytes of weights, metrics and teacher's cache."""
    found: dict[str, Any] = {
        str(path.relative_to(directory)): path.read_bytes()
        for pattern in ("run/train/own/round-*/model/model.safetensors", "run/train/own/**/metrics.jsonl")
        for path in directory.glob(pattern)
    }
    found |= {str(path): path.read_bytes() for path in sorted((directory / "cache").rglob("*")) if path.is_file()}
    own = directory / "run" / "own" / "own"
    if (own / "cache.json").is_file():
        answered = Cache.open_sequences(own, verify=True)
        for row in (answered[index] for index in range(len(answered))):
            found[row.row_key.hex()] = [row.source, row.token_ids.tolist()]
    if any(own.glob("targets/*/part-*")):
        scored = Cache.open(own, verify=True, allow_partial=True)
        for row in (scored[index] for index in range(len(scored))):
            assert row.targets is not None
            kept = row.targets
            arrays = (kept.ids, kept.logprobs, kept.tail_logmass, kept.draws[0].ids)
            found[f"{row.row_key.hex()} targets"] = [values.tolist() for values in arrays]
    return found


def do_step(document: dict[str, Any], step: str, number: int) -> None:
    """Do one step of a recipe's stage with rounds; `teach`: build its cache."""
    from shared.recipe.recipe import Recipe
    from teacher_cache.build import teach
    from tools.rounds import steps
    from tools.rounds.one_round import Round

    recipe = Recipe.model_validate(document)
    if step == "teach":
        teach(recipe)
    else:
        {"answer": steps.answer, "score": steps.score, "train": steps.train}[step](
            Round(recipe, recipe.stages[0], number)
        )


class Trials:
    """Kills and continues every step in turn."""

    def __init__(self, teacher: Path, student: Path, prompts: Path, root: Path, seed: int) -> None:
        """Run everything once without kills, and keep what stood before and after each step."""
        self._forked = Forked("student_train.stage.stages", "tools.rounds.steps")
        self._root, self._chance = root, random.Random(seed)
        self._place = root / "now"
        self._place.mkdir()
        self._recipe = recipe_of(teacher, student, prompts, self._place)
        self._run("teach", 0)
        self._after: dict[tuple[str, int], dict[str, Any]] = {}
        self._seconds: dict[tuple[str, int], float] = {}
        for number in range(1, ROUNDS + 1):
            for step in STEPS:
                shutil.copytree(self._place, self._before(step, number), symlinks=True)
                started = time.monotonic()
                self._run(step, number)
                self._seconds[step, number] = time.monotonic() - started
                self._after[step, number] = outcome(self._place)

    def trial(self, step: str, number: int, kills: int) -> tuple[int, bool]:
        """Do a step with at most `kills` kills; return how many there were, and whether all came out equal."""
        shutil.rmtree(self._place)
        shutil.copytree(self._before(step, number), self._place, symlinks=True)
        done = 0
        for _ in range(kills):
            moment = self._chance.uniform(0.05, 1.0) * self._seconds[step, number]
            if not self._run(step, number, moment):
                break
            done += 1
        self._run(step, number)
        return done, outcome(self._place) == self._after[step, number]

    def _run(self, step: str, number: int, kill_after: float = math.inf) -> bool:
        """Run a step until it ends, or for so many seconds; return whether it was killed."""
        end = time.monotonic() + kill_after
        log = self._place / "run.log"
        return self._forked.run(log, do_step, self._recipe, step, number, kill_when=lambda: time.monotonic() >= end)

    def _before(self, step: str, number: int) -> Path:
        return self._root / f"before-{number}-{step}"


def main(argv: list[str] | None = None) -> int:
    """Make the trials, print the table and write it into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", type=Path, default=Path("data/demo/teacher"))
    parser.add_argument("--student", type=Path, default=Path("data/demo/student"))
    parser.add_argument("--prompts", type=Path, default=Path("data/demo/math.train.jsonl"))
    parser.add_argument("--no-page", action="store_true", help="print only, leave docs/benchmarks.md as it is")
    options = parser.parse_args(argv)
    if not options.teacher.is_dir():
        raise UsageError(f"there is no teacher in {options.teacher}; run `make setup`, or name one with --teacher")
    killed, runs, equal = Counter[str](), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="decant-kills-") as root:
        trials = Trials(
            options.teacher.resolve(), options.student.resolve(), options.prompts.resolve(), Path(root), options.seed
        )
        turn = 0
        while killed.total() < options.kills:
            step, number = STEPS[turn % 3], turn // 3 % ROUNDS + 1
            kills, same = trials.trial(step, number, min(MOST_KILLS, options.kills - killed.total()))
            killed[step] += kills
            runs[step] += 1
            equal[step] += same
            turn += 1
            print(f"round {number}, {step}: {kills} kills, {'equal' if same else 'DIFFERENT'}", file=sys.stderr)
    rows = [[step, str(killed[step]), f"{equal[step]} of {runs[step]}"] for step in STEPS]
    rows.append(["all", str(killed.total()), f"{equal.total()} of {runs.total()}"])
    text = table(["step", "kills", "equal to the unbroken run"], rows)
    print(text)
    if not options.no_page:
        command = f"python -m tools.bench.trials.rounds_kill_trials --kills {options.kills}"
        replace_section("rounds_kills", f"## Kill trials of rounds\n\n{measured_by(command)}\n\n{text}")
    return 0 if equal.total() == runs.total() else 1


if __name__ == "__main__":
    sys.exit(main())
