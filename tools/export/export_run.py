"""`decant export RUN`: a trained stage as a plain model directory, with tokenizer, generation settings and card.

The stage's model is merged and whole already (student_train/stage/export.py); it is copied, never changed, into a
directory that is whole or absent. Chat template and end tokens are those that its caches say it was trained with, also
where an older version trained it. The same command again finds the export and copies nothing. No model is loaded.
Cost: the size of the model, once.
"""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.cache.cache import Cache
from shared.cache.chat_settings import chat_settings_of, unwritten_settings, write_chat_settings
from shared.errors import DecantError, EvaluationError, NamingError, UsageError
from shared.identity.weights_hash import weights_hash
from shared.models.end_tokens import declared_end_ids
from shared.models.files import load_tokenizer
from shared.recipe.base import closest, quoted
from shared.recipe.recipe import Recipe, Stage
from shared.special_files import refuse_links_outside
from shared.text import strict_json
from teacher_cache.engines.vllm.vllm_version import serving_command
from tools.cache.staged_directory import claim, publish, refuse_existing, staging_path
from tools.export.card_use import ChatUsage
from tools.export.export_dtype import convert_weights
from tools.export.model_card import model_card
from tools.report.figures import report_figures
from tools.report.run_files import read_run

PROOF = "decant-export.json"
NEEDED = ("config.json", "generation_config.json", "tokenizer_config.json")


def export_run(
    run: Path, stage_name: str | None, output: Path | None, *, keep_adapter: bool, dtype: str | None = None
) -> tuple[dict[str, Any], str]:
    """Write one stage's model as a directory; return what programs read and what people read.

    Args:
        run: output_dir of a recipe.
        stage_name: whose model; None: the last stage that is finished.
        output: the new directory; None: RUN/export/STAGE.
        keep_adapter: put the adapter by itself into `adapter/`.
        dtype: convert the weights to this type; None: as they are.

    Raises:
        EvaluationError: it is no run, or its recipe cannot be read.
        UsageError: there is no such stage, it has no adapter, or the output holds the same weights otherwise.
        ModelError: a file of it is a link that leads elsewhere.
        DecantError: the model is not whole, or the output holds something else.
    """
    files = read_run(run)
    if files.recipe is None or files.recipe.student is None:
        raise NamingError(
            f"{run}/recipe.yaml is missing, damaged or without a student; name the output_dir of a trained recipe"
        )
    recipe = files.recipe
    stage = _stage(run, recipe, stage_name)
    source = run / "train" / stage.name
    _check_whole(source)
    refuse_links_outside(source / "model", (source / "model").rglob("*"))
    adapter = source / "adapter" if keep_adapter else None
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        why = "trained all of its weights, so there is no adapter"
        if stage.rounds is not None:
            why = "has rounds, each with an adapter over the model of the one before, so none leads to its model"
        raise UsageError(f"--keep-adapter: stage '{stage.name}' {why}; leave it out")
    if adapter is not None:
        refuse_links_outside(adapter, adapter.rglob("*"))
    out = output or run / "export" / stage.name
    weights = weights_hash(source / "model")
    trained_with = _trained_with(recipe, source / "model")
    identity = {"weights": weights, "stage": stage.name, "keep_adapter": keep_adapter}
    identity |= ({"dtype": dtype} if dtype else {}) | (
        {"settings": trained_with.changes} if trained_with.changes else {}
    )
    reused = _is_there(out, identity)
    if not reused:
        report = report_figures([files])
        card = model_card(recipe, stage, report, cache_identities(recipe), weights, trained_with.usage, dtype)
        _write(out, source / "model", adapter, trained_with, dtype, card, identity)
    result = {"model": str(out), "stage": stage.name, "weights": weights, "reused": reused, **_commands(out)}
    words = "is there already, with the same weights" if reused else "written"
    usual = f"vllm serve {shlex.quote(str(out))}"
    elsewhere = "" if result["serve"] == usual else f" (with the GPU build: {usual})"
    text = f"{out}: {words}\n  serve it:    {result['serve']}{elsewhere}\n  convert it:  {result['gguf']}"
    note = trained_with.usage.note
    return {**result, "note": note}, text + (f"\n  note:        {note}" if note else "")


@dataclass(frozen=True, slots=True)
class _TrainedWith:
    """What the recipe's caches tell of how the student was trained, for a stage's model."""

    usage: ChatUsage
    tokenizer: Any
    changes: dict[str, Any]
    """What of it the stage's model does not say itself, such as one that an older version trained."""


def _trained_with(recipe: Recipe, model_dir: Path) -> _TrainedWith:
    """Find out which template and end tokens belong to a stage's model."""
    tokenizer, ends = load_tokenizer(model_dir, trust_remote_code=False), declared_end_ids(model_dir)
    try:
        settings = chat_settings_of(recipe, [Cache.open_sequences(path) for path in recipe.cache], tokenizer)
    except DecantError as error:
        note = f"template and end tokens are those of the stage's model, unchecked: {error}"
        return _TrainedWith(ChatUsage(None, ends, note), tokenizer, {})
    return _TrainedWith(
        ChatUsage(settings, ends, settings.note), tokenizer, unwritten_settings(model_dir, settings, tokenizer)
    )


def _stage(run: Path, recipe: Recipe, name: str | None) -> Stage:
    """Return the stage to export."""
    names = [stage.name for stage in recipe.stages]
    if name is not None:
        if name not in names:
            raise UsageError(f"--stage {name}: the run has the stages {quoted(names)}{closest(name, names)}")
        if not (run / "train" / name / "done.json").is_file():
            raise EvaluationError(
                f"stage '{name}' of {run} is not finished; run `decant train` with its recipe, then export again"
            )
        return recipe.stages[names.index(name)]
    for stage in reversed(recipe.stages):
        if (run / "train" / stage.name / "done.json").is_file():
            return stage
    raise EvaluationError(f"{run} has no finished stage; run `decant train` with its recipe, then export again")


def _check_whole(stage_dir: Path) -> None:
    """Refuse a model directory that transformers or vLLM would not load."""
    model = stage_dir / "model"
    missing = [name for name in NEEDED if not (model / name).is_file()]
    if not missing and not list(model.glob("*.safetensors")):
        missing = ["*.safetensors"]
    if missing:
        raise EvaluationError(
            f"{model} has no {' and no '.join(missing)}; remove {stage_dir} and run `decant train` with the run's "
            "recipe again"
        )


def cache_identities(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the identity of each cache of a recipe that can be read: of its sequences and of its layer, if any."""
    from tools.evaluate.results.results import heldout_layer

    found = []
    for path in recipe.cache:
        try:
            cache = Cache.open(path, heldout_layer(recipe), allow_partial=True)
        except DecantError:
            continue  # the card names the caches that it could not read
        layer = cache.layer.to_json() if cache.layer else {}
        about = cache.sequences_identity.to_json()
        found.append(
            {
                "path": str(path),
                "cache_id": cache.cache_id,
                "licence": about["licence"],
                "answers": about["answers"],
                **layer,
            }
        )
    return found


def _is_there(out: Path, identity: dict[str, Any]) -> bool:
    """Tell whether the same export stands there, whole; refuse anything else by what differs."""
    try:
        found = strict_json.loads((out / PROOF).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None  # not an export, or a damaged one: not this one in either case
    if not isinstance(found, dict) or found.get("weights") != identity["weights"]:
        refuse_existing(out, "an export of these weights")
        return False
    names = sorted({*found, *identity})
    for name in (name for name in names if found.get(name) != identity.get(name)):
        there, asked = json.dumps(found.get(name)), json.dumps(identity.get(name))
        raise UsageError(
            f"{out} is an export of these weights with {name} {there} where {asked} is asked for; remove it, or name "
            "another place with --output"
        )
    adapter = ["adapter/adapter_config.json"] if identity["keep_adapter"] else []
    missing = [name for name in (*NEEDED, *adapter) if not (out / name).is_file()]
    if missing or not list(out.glob("*.safetensors")):
        raise EvaluationError(
            f"{out} was exported, but has lost {(missing or ['its weights'])[0]}; remove it and export again"
        )
    return True


def _write(
    out: Path,
    model: Path,
    adapter: Path | None,
    trained_with: _TrainedWith,
    dtype: str | None,
    card: str,
    identity: dict[str, Any],
) -> None:
    """Copy a model to its place by way of a directory beside it, synced before it gets its name."""
    from student_train.records.checkpoints import fsync_tree

    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    staging = staging_path(out, "export", identity["weights"])
    claim(staging)
    for left in staging.iterdir():  # of a killed export
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    _copied(model, staging)
    if trained_with.usage.settings is not None:
        write_chat_settings(staging, trained_with.usage.settings, trained_with.tokenizer)
    if dtype is not None:
        try:
            convert_weights(staging, dtype)
        except UsageError:
            shutil.rmtree(staging)
            raise
    if adapter is not None:
        _copied(adapter, staging / "adapter")
    (staging / "README.md").write_text(card, encoding="utf-8")
    (staging / PROOF).write_text(json.dumps(identity, indent=1), encoding="utf-8")
    fsync_tree(staging)
    publish(staging, out, out / PROOF)


def _commands(out: Path) -> dict[str, str]:
    """Return the commands that serve and convert an exported model."""
    name = out.name if out.name not in ("", ".") else "model"
    return {
        "serve": shlex.join(serving_command(str(out))),
        "gguf": f"python llama.cpp/convert_hf_to_gguf.py {shlex.quote(str(out))} --outfile {shlex.quote(name)}.gguf "
        "--outtype bf16",
    }


def _copied(source: Path, target: Path) -> None:
    """Copy a directory with what its links lead to.

    Raises:
        EvaluationError: a file cannot be read or written.
    """
    try:
        shutil.copytree(source, target, symlinks=False, dirs_exist_ok=True)
    except shutil.Error as error:
        _, place, said = error.args[0][0]
        reason = said.split(": '", 1)[0]  # without its two paths
        raise EvaluationError(
            f"{place} cannot be written ({reason}); free some space or correct permissions, then run the same command "
            "again"
        ) from None
