"""`python -m tools.bench.trials.train_kill_trials --kills 50`: trainings killed with SIGKILL, continued, compared.

For each setting (all weights, LoRA with dropout, accumulation, a mixture of sources, data workers, two stages in a row,
bfloat16, evaluation that keeps the best) one run is left alone. Others are killed from outside once a randomly drawn
one of the optimizer steps that are left has been logged and up to 50 ms have passed, so that kills fall into steps,
into checkpoints and between them; each is continued, up to three times killed, and at last left to finish. Its metrics,
evaluations and final weights must be those of the run that was left alone, byte for byte.
Cost: about two short trainings per kill, in processes forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import UsageError
from student_train.records.checkpoints import list_checkpoints
from tools.bench.benchmarks_page import measured_by, replace_section, table
from tools.bench.trials.forked import Forked

STEPS = 12
COMPARED = ("metrics.jsonl", "evaluations.jsonl", "model/model.safetensors", "model/config.json")
_TRAINER = {"max_steps": STEPS, "pack_tokens": 256, "save_steps": 3, "learning_rate": 3e-3, "report_to": "none"}
_LOSSES = [{"name": "forward_kl", "weight": 0.9}, {"name": "cross_entropy", "weight": 0.1}]

SETTINGS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA with dropout": {"student": {"adapter": {"kind": "lora", "r": 4, "dropout": 0.2}}},
    "accumulation": {"trainer": {"gradient_accumulation_steps": 3}},
    "mixture of sources": {"stage": {"mixture": {"math": 0.6, "code": 0.3, "aiops": 0.1}}},
    "data workers": {"trainer": {"dataloader_num_workers": 2}},
    "two stages": {"chain": True},
    "bfloat16": {"trainer": {"bf16": True}},
    "evaluation, best kept": {
        "stage": {"evaluate": {"every_steps": 4, "rows_per_source": 2, "samples": 0, "keep_best": True}}
    },
}
"""What each setting adds to the recipe; keys of `student`, of the stage and of its trainer."""


def recipe_of(setting: str, cache: Path, student: Path, output_dir: Path) -> dict[str, Any]:
    """Return a recipe as plain data."""
    more = SETTINGS[setting]
    stage = {
        "name": "kd",
        "losses": _LOSSES,
        "trainer": {**_TRAINER, **more.get("trainer", {})},
        **more.get("stage", {}),
    }
    stages = [stage]
    if more.get("chain"):
        stages = [{**stage, "name": "first", "trainer": {**stage["trainer"], "max_steps": STEPS // 2}}]
        stages.append({**stage, "init_from": "previous", "trainer": {**stage["trainer"], "max_steps": STEPS // 2}})
    return {
        "name": "kills",
        "output_dir": str(output_dir),
        "cache": str(cache),
        "student": {"model": str(student), **more.get("student", {})},
        "stages": stages,
    }


def train(document: dict[str, Any]) -> None:
    """Train a recipe's stages."""
    from shared.recipe.recipe import Recipe
    from student_train.stage.stages import run_stages

    run_stages(Recipe.model_validate(document))


def steps_logged(output_dir: Path, stage: str = "*") -> int:
    """Return how many steps a stage or all stages have logged."""
    return sum(path.read_bytes().count(b"\n") for path in output_dir.glob(f"train/{stage}/metrics.jsonl"))


def inodes(output_dir: Path) -> set[int]:
    """Return which files the step logs are; a run writes its own, cut back to where it goes on, before
    its first step.
    """
    return {path.stat().st_ino for path in output_dir.glob("train/*/metrics.jsonl")}


def steps_kept(output_dir: Path) -> int:
    """Return after how many steps of all stages a run would go on."""
    total = 0
    for stage in output_dir.glob("train/*"):
        if (stage / "done.json").exists():
            total += steps_logged(output_dir, stage.name)
        else:
            total += max((checkpoint.step for checkpoint in list_checkpoints(stage)), default=0)
    return total


def outcome(output_dir: Path) -> dict[str, bytes]:
    """Return the files that must not depend on kills."""
    files = [path for stage in output_dir.glob("train/*") for name in COMPARED if (path := stage / name).exists()]
    return {str(path.relative_to(output_dir)): path.read_bytes() for path in files}


@dataclass
class Tally:
    """What came of one setting."""

    kills: int = 0
    runs: int = 0
    equal: int = 0
    kill_steps: list[int] = field(default_factory=list)
    """Steps logged at each kill."""


class Trials:
    """Kills and continues trainings of every setting in turn."""

    def __init__(self, cache: Path, student: Path, root: Path, seed: int) -> None:
        """Prepare trials that write below `root`."""
        self._cache, self._student, self._root = cache, student, root
        self._chance = random.Random(seed)
        self._forked = Forked("peft", "student_train.stage.stages")
        self._whole: dict[str, dict[str, bytes]] = {}

    def trial(self, setting: str, tally: Tally, kills: int) -> None:
        """Train once with at most `kills` kills, and compare."""
        if setting not in self._whole:
            recipe = recipe_of(setting, self._cache, self._student, self._root / "whole")
            self._forked.run(self._root / "whole.log", train, recipe)
            self._whole[setting] = outcome(self._root / "whole")
            shutil.rmtree(self._root / "whole")
        out, log = self._root / "killed", self._root / "killed.log"
        recipe = recipe_of(setting, self._cache, self._student, out)
        for _ in range(kills):
            if self._forked.run(log, train, recipe, kill_when=self._moment(out)):
                tally.kills += 1
                tally.kill_steps.append(steps_logged(out))
            else:
                break
        self._forked.run(log, train, recipe)
        tally.runs += 1
        same = outcome(out) == self._whole[setting]
        tally.equal += same
        if same:
            shutil.rmtree(out)
        else:
            out.rename(self._root / f"different-{setting.replace(' ', '-')}-{tally.runs}")

    def _moment(self, out: Path) -> Callable[[], bool]:
        """Return a function that says, asked again and again, when to kill."""
        wanted, delay = self._chance.randrange(min(steps_kept(out), STEPS - 1), STEPS), self._chance.uniform(0, 0.05)
        reached: list[float] = []
        before = inodes(out)

        def is_now() -> bool:
            if not reached and inodes(out) - before and steps_logged(out) >= wanted:
                reached.append(time.monotonic())
            return bool(reached) and time.monotonic() >= reached[0] + delay

        return is_now


def main(argv: list[str] | None = None) -> int:
    """Make the trials, print the table and write it into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/demo/cache"), help="as `decant teach recipes/demo.yaml` builds it"
    )
    parser.add_argument("--student", type=Path, default=Path("data/demo/student"))
    parser.add_argument("--no-page", action="store_true", help="print only, leave docs/benchmarks.md as it is")
    options = parser.parse_args(argv)
    if not options.cache.is_dir():
        raise UsageError(
            f"there is no cache in {options.cache}; build it with `decant teach recipes/demo.yaml`, or name it with "
            "--cache"
        )
    tallies = {setting: Tally() for setting in SETTINGS}
    with tempfile.TemporaryDirectory(prefix="decant-kills-") as root:
        trials = Trials(options.cache, options.student, Path(root), options.seed)
        while (done := sum(tally.kills for tally in tallies.values())) < options.kills:
            setting = min(tallies, key=lambda name: (tallies[name].runs, list(tallies).index(name)))
            trials.trial(setting, tallies[setting], min(3, options.kills - done))
            print(f"{setting}: {tallies[setting]}", file=sys.stderr, flush=True)
    total = sum(tally.kills for tally in tallies.values())
    rows = [
        [name, str(tally.kills), ", ".join(map(str, sorted(tally.kill_steps))), f"{tally.equal} of {tally.runs}"]
        for name, tally in tallies.items()
        if tally.runs
    ]
    runs, equal = sum(tally.runs for tally in tallies.values()), sum(tally.equal for tally in tallies.values())
    rows.append(["all", str(total), "", f"{equal} of {runs}"])
    text = table(["setting", "kills", f"steps logged at the kill (of {STEPS})", "runs equal byte for byte"], rows)
    print(text)
    if not options.no_page:
        command = f"python -m tools.bench.trials.train_kill_trials --kills {options.kills}"
        replace_section("train_kills", f"## Kill trials of training\n\n{measured_by(command)}\n\n{text}")
    return 0 if equal == runs else 1


if __name__ == "__main__":
    sys.exit(main())
