"""A stage with rounds, seen from outside: one model, one log, one health, made of those of its rounds.

train/STAGE/model is a link to the last round that was trained, also where a copy had made a directory of it; metrics,
timing and evaluations are those of the rounds one after another, their steps counted on; health.json is that of the
last round, with what every round's answers were like. All of it is made anew from the rounds' own files, so doing it
twice changes nothing.
Cost: small files, and a pass over the rounds' answers.
"""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

from shared.atomic import fsync_dir, make_dir, write_atomic
from shared.errors import TrainingError
from shared.recipe.recipe import Recipe, Stage
from student_train.records.kept_json import read_kept
from student_train.records.metrics_log import read_steps
from student_train.stage.stage_identity import DONE_FILE, IDENTITY_FILE, start_identity
from tools.rounds.guards import round_figures
from tools.rounds.one_round import Round

IDENTITY = {"rounds": "of own answers", "stage": {"losses": []}}
"""What identity.json of a stage with rounds says: the rounds have identities of their own."""
LOGS = ("metrics.jsonl", "timing.jsonl", "evaluations.jsonl")


def require_of_rounds(one: Round) -> None:
    """Refuse a directory that is not for rounds.

    Raises:
        TrainingError: it holds a stage that was trained without rounds.
    """
    directory = one.recipe.stage_dir(one.stage.name)
    path = directory / IDENTITY_FILE
    if path.exists() and "rounds" not in read_kept(path):
        raise TrainingError(
            f"{directory} holds a stage that was trained without rounds; remove or rename it, or give this stage "
            "another name"
        )


def published_rounds(recipe: Recipe, stage: Stage) -> int:
    """Return the rounds of a finished stage; 0 where it is not finished."""
    path = recipe.stage_dir(stage.name) / DONE_FILE
    rounds = read_kept(path).get("rounds", 0) if path.is_file() else 0
    return rounds if type(rounds) is int else 0


def publish(one: Round, stopped: str | None = None) -> Path:
    """Show the rounds up to this one, and those that were trained from it before, as their stage; return its model.

    The round was trained last, or stopped before it was trained, with `stopped` as the reason.
    """
    stage_dir = one.recipe.stage_dir(one.stage.name)
    require_of_rounds(one)
    make_dir(stage_dir)
    write_atomic(stage_dir / IDENTITY_FILE, json.dumps(IDENTITY, indent=1).encode(), what="identity")
    trained = [Round(one.recipe, one.stage, number) for number in range(1, one.number + (stopped is None))]
    if stopped is None:
        trained += _following(one)
    steps = [_last_step(each.directory / "metrics.jsonl") for each in trained]
    for name in LOGS:
        _join(stage_dir / name, [each.directory / name for each in trained], steps)
    if trained:
        _link(stage_dir / "model", Path(trained[-1].directory.name) / "model")
    every = [*trained, one] if stopped else trained
    health: dict[str, Any] = read_kept(trained[-1].directory / "health.json") if trained else {"healthy": False}
    health["rounds"] = [{"round": each.number, **round_figures(each).document} for each in every]
    if stopped:
        health |= {"healthy": False, "stopped": f"round {one.number}: {stopped}"}
    write_atomic(stage_dir / "health.json", json.dumps(health, indent=1).encode(), what="health")
    done = stage_dir / DONE_FILE
    if stopped is None and len(trained) == one.settings.count:
        write_atomic(done, json.dumps({"rounds": len(trained)}, indent=1).encode(), what="done")
    else:
        done.unlink(missing_ok=True)
    return stage_dir / "model"


def _following(one: Round) -> list[Round]:
    """Return the finished rounds after this one that began with the weights of the round before them."""
    found: list[Round] = []
    for number in range(one.number + 1, one.settings.count + 1):
        later = Round(one.recipe, one.stage, number)
        path = later.directory / IDENTITY_FILE
        if not (later.directory / DONE_FILE).is_file() or not path.is_file():
            break
        assert one.recipe.student is not None
        if read_kept(path, "start")["start"] != start_identity(one.recipe.student, later.start, later.seed):
            break
        found.append(later)
    return found


def _join(target: Path, logs: list[Path], steps: list[int]) -> None:
    """Write logs of rounds, of so many steps each, as one, steps counted on; each line says its round."""
    lines: list[dict[str, Any]] = []
    for number, log in enumerate(logs, 1):
        before = sum(steps[: number - 1])
        lines += [{**row, "step": row["step"] + before, "round": number} for row in read_steps(log)]
    if lines:
        write_atomic(target, "".join(json.dumps(line) + "\n" for line in lines).encode(), what=target.stem)


def _last_step(log: Path) -> int:
    rows = read_steps(log)
    return int(rows[-1]["step"]) if rows else 0


def _link(path: Path, target: Path) -> None:
    """Point a relative link elsewhere in one step; a copy of the run that followed the link left a directory there.

    Raises:
        TrainingError: the directory there is of no round, or the file system has no links.
    """
    partial, aside = path.with_name(f".{path.name}.link"), path.with_name(f".{path.name}.copied")
    shutil.rmtree(aside, ignore_errors=True)
    if path.is_dir() and not path.is_symlink():
        if not any(_same_files(path, model) for model in path.parent.glob("round-*/model")):
            raise TrainingError(
                f"{path} is a directory with a model of none of the rounds, where a link to the last round's belongs; "
                "move it away, then run the same command again"
            )
        path.rename(aside)
    try:
        partial.unlink(missing_ok=True)
        partial.symlink_to(target, target_is_directory=True)
        partial.replace(path)
        fsync_dir(path.parent)
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be made a link to {target} ({error.strerror}); put output_dir on a file system with "
            "symbolic links, and check its permissions"
        ) from None
    shutil.rmtree(aside, ignore_errors=True)


def _same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])
