"""What a stage's result depends on, so that a finished stage is reused only where nothing of it changed.

What does not change the result is left out: how often is saved, logged and reported, when it stops
as diverged, how many processes read, whether they hold shards. Cost: samples of the start model's weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from shared.atomic import write_atomic
from shared.errors import ModelError, TrainingError
from shared.identity.grown import first_difference
from shared.identity.weights_hash import weights_hash
from shared.keys import canonical_json
from shared.models.files import load_config
from shared.models.load_report import loading
from shared.models.weights.weight_headers import weight_files
from shared.recipe.base import Section
from shared.recipe.recipe import Student
from shared.recipe.sections.losses import LOSS_KINDS
from student_train.records.checkpoints import SETTINGS
from student_train.records.kept_json import read_kept
from student_train.records.processes import num_processes
from student_train.stage.stage_order import windows_of
from student_train.stage.stage_work import StageWork

IDENTITY_FILE = "identity.json"
DONE_FILE = "done.json"

_WITHOUT_EFFECT = (
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "max_grad_norm_factor",
    "dataloader_num_workers",
    "report_to",
    "seed",
    "fsdp",
)


def stage_identity(work: StageWork, *, only_moved: bool = False) -> dict[str, Any]:
    """Return what a stage's final weights depend on, as JSON values; `only_moved` leaves out settings at their
    default.
    """
    not_trained_with: Any = {
        "name": True,
        "init_from": True,
        "evaluate": True,
        "sampling": True,
        "balance": True,
        "window_parts": True,
        "trainer": set(_WITHOUT_EFFECT),
    }

    def said(section: Section, **kept: Any) -> dict[str, Any]:
        return section.model_dump(mode="json", exclude_defaults=only_moved, **kept)

    trainer = work.stage.trainer  # not recomputing is one thing, whoever says it
    trainer = trainer.model_copy(update={"gradient_checkpointing": trainer.gradient_checkpointing or None})
    stage = said(work.stage.model_copy(update={"trainer": trainer}), exclude=not_trained_with)
    if not only_moved:
        stage["trainer"]["gradient_checkpointing"] = trainer.gradient_checkpointing or False
    evaluate = work.stage.evaluate
    schedule: dict[str, Any] = {}
    if work.run is not None:
        schedule["run"] = {"steps_before": work.run.before, "steps": work.run.total}
    windows = windows_of(work.stage, work.caches)
    if windows is not None:
        schedule["window_parts"] = windows.size
    if work.stage.balance.kind != "fixed":
        schedule["balance"] = said(work.stage.balance)
    if work.stage.sampling is not None:
        schedule["sampling"] = said(work.stage.sampling)
    if evaluate is not None and (evaluate.decides or work.stage.sampling is not None):
        schedule["evaluate"] = said(evaluate, exclude={"samples", "sample_tokens"})
    return {
        "stage": stage | schedule,
        "student": said(work.student, exclude={"model", "revision", "init", "trust_remote_code"}),
        "start": start_identity(work.student, work.start, work.seed),
        "cache": work.caches.cache_id,
        "plan": work.plan.hash,
        "heldout_fraction": work.recipe.heldout.fraction,
        "seed": work.seed,
    }


def start_identity(student: Student, start: Path | None, seed: int) -> str:
    """Return what the starting weights are: a hash of them, a hub's commit, or the seed and config of fresh ones."""
    if start is None and student.init == "random":
        trust = student.trust_remote_code
        config = load_config(student.model, what="the student", revision=student.revision, trust_remote_code=trust)
        volatile = ("transformers_version", "_name_or_path")
        document = {name: value for name, value in config.to_dict().items() if name not in volatile}
        text = json.dumps(document, sort_keys=True, default=str)
        return f"random, seed {seed}, config {xxhash.xxh3_64_hexdigest(text.encode())}"
    directory = Path(student.model) if start is None else start
    if directory.is_dir():
        return f"weights {weights_hash(directory)}"
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    with loading(f"the student '{student.model}'"):
        path = cached_file(student.model, "config.json", revision=student.revision)
    return f"{student.model} at {extract_commit_hash(path, None)}"


def claim_stage(work: StageWork) -> bool:
    """Take a stage's directory for this identity; return whether the stage is finished already.

    A setting that the recorded identity lacks, since it was written before the setting existed, means the setting's
    default.

    Raises:
        TrainingError: the directory holds a stage of another identity.
    """
    stage_dir, path = work.directory, work.directory / IDENTITY_FILE
    wanted = json.loads(json.dumps(stage_identity(work)))
    if path.exists():
        moved = json.loads(json.dumps(stage_identity(work, only_moved=True)))
        recorded = _named_as_now(_recorded(path), wanted)
        other = first_difference(_without_plan(recorded), _without_plan(wanted), _without_plan(moved))
        other = other or first_difference(recorded, wanted, moved)
        if other is not None:
            state = "a finished stage" if (stage_dir / DONE_FILE).exists() else "a begun stage"
            raise TrainingError(f"{stage_dir} holds {state} {_told(*other)}")
        return _is_finished(stage_dir)
    stage_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(wanted, indent=1).encode(), what="identity")
    return False


def checkpoint_of(work: StageWork) -> dict[str, str]:
    """Return what a checkpoint of a claimed stage records: another recipe's may have the same plan and caches."""
    path = work.directory / IDENTITY_FILE
    if not path.is_file():  # trained outside of its run, such as by a bench
        return work.belongs_to
    return {**work.belongs_to, SETTINGS: xxhash.xxh3_128_hexdigest(canonical_json(read_kept(path)))}


def finished_before_it_grew(work: StageWork) -> bool:
    """Tell whether a stage was finished with this identity, whatever rows the last of its caches got since.

    The caller knows that the stage does not read those rows; they only move the others to other places.
    """
    path = work.directory / IDENTITY_FILE
    if not path.is_file() or not _is_finished(work.directory):
        return False
    recorded = _recorded(path)
    before, _, last = str(recorded.get("cache")).rpartition("+")
    if before != work.caches.cache_id.rpartition("+")[0] or not last:
        return False
    wanted, moved = (json.loads(json.dumps(stage_identity(work, only_moved=only))) for only in (False, True))
    same = {name: recorded.get(name) for name in ("cache", "plan")}
    return first_difference(recorded, wanted | same, moved | same) is None


def _is_finished(stage_dir: Path) -> bool:
    return (stage_dir / DONE_FILE).exists() and lost_since(stage_dir) is None


def lost_since(stage_dir: Path) -> str | None:
    """Say what the model of a finished stage lacks, as after a copy that was cut short or left files out."""
    model_dir = stage_dir / "model"
    if not (model_dir / "config.json").is_file():
        return f"{model_dir} has no config.json"
    try:
        weight_files(model_dir)
        weights_hash(model_dir)  # reads some of every tensor, so a file that was cut is found
    except ModelError as error:
        return str(error)
    return None


def _recorded(path: Path) -> dict[str, Any]:
    """Return a recorded identity, as this version would have written its losses."""
    found = read_kept(path, "stage")
    stage, losses = found["stage"], found["stage"].get("losses", []) if isinstance(found["stage"], dict) else None
    if not isinstance(losses, list) or not all(isinstance(loss, dict) for loss in losses):
        raise TrainingError(f"{path} names no losses of a stage; put it back from a copy, or rename {path.parent}")
    return {**found, "stage": {**stage, "losses": [LOSS_KINDS.without_foreign_defaults(loss) for loss in losses]}}


def _named_as_now(recorded: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded identity with its layers called as the recipe calls them now, where the same ones are read.

    A layer that is added to a cache makes others name theirs, which changes nothing: `cache` says what was read.
    """
    if recorded.get("cache") != wanted["cache"]:
        return recorded
    now = {name: wanted["stage"][name] for name in ("targets", "hidden")}
    names = {
        name: value
        for name, value in now.items()
        if not isinstance(value, list) and not isinstance(recorded["stage"].get(name), list)
    }
    return {**recorded, "stage": {**recorded["stage"], **names}}


def _without_plan(identity: dict[str, Any]) -> dict[str, Any]:
    """Leave out the plan, which any other difference may move and which names none."""
    return {name: value for name, value in identity.items() if name != "plan"}


def _told(name: str, old: Any, new: Any) -> str:
    """Say what a stage has and what the recipe has, and what to do."""
    again = "remove or rename the directory to train it again"
    if name == "plan":
        now = f"{num_processes()} process{'es' if num_processes() > 1 else ''}"
        return (
            "of the same settings whose steps were planned otherwise, as for another number of processes (now "
            f"{now}); start as many as before (`decant eval` takes a finished stage as it is), or {again}"
        )
    if name == "cache":
        return f"of other rows than its caches hold now; {again} (`decant eval` takes a finished stage as it is)"
    return f"with {name} {_short(old)} where the recipe now has {_short(new)}; {again}, or change the recipe back"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def mark_done(work: StageWork, num_steps: int) -> None:
    """Mark a stage finished, after everything else of it is on disk."""
    identity = canonical_json(stage_identity(work, only_moved=True))
    document = {"identity": xxhash.xxh3_128_hexdigest(identity), "steps": num_steps}
    write_atomic(work.directory / DONE_FILE, json.dumps(document, indent=1).encode(), what="done")
