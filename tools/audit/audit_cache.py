"""`decant cache audit`: is a cache what its teacher says, what would a smaller capture lose; a document and tables.

Cost: the recorded teacher in transformers, three forward passes per sampled row (and one of the student).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.atomic import write_atomic
from shared.cache.cache import Cache
from shared.errors import CacheError, IdentityError, UsageError
from shared.recipe.recipe import Recipe
from shared.recipe.sections.teacher import TransformersTeacher
from shared.schema import MAX_K, MAX_TEMPERATURES


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSettings:
    """What is audited, and with which models."""

    targets: str | None = None
    """Targets layer; None for the only one."""
    teacher: str | None = None
    """Where the teacher lies; None: where the layer says."""
    adapter: str | None = None
    student: str | None = None
    """Completes tails; None: the mean of the teacher's distributions."""
    trust_remote_code: bool = False
    rows: int = 32
    seed: int = 0
    ks: Sequence[int] = (8, 16, 32, 64)
    masses: Sequence[float] = (0.99, 0.999, 1.0)
    temperatures: Sequence[float] = ()
    """Besides those of the layer."""


def settings_of(recipe: Recipe | None, given: Mapping[str, Any]) -> AuditSettings:
    """Return settings from the command line, completed by a recipe's teacher and student."""
    values = {key: value for key, value in given.items() if value is not None}
    if recipe is not None:
        if recipe.teacher is not None:
            values.setdefault("teacher", recipe.teacher.model)
            values.setdefault("trust_remote_code", recipe.teacher.trust_remote_code)
            if recipe.teacher.adapter is not None:
                values.setdefault("adapter", recipe.teacher.adapter)
        if recipe.student is not None and recipe.student.init == "pretrained":
            values.setdefault("student", recipe.student.model)
    return AuditSettings(**values)


def run_audit(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Audit a cache as the options say; return the document and its text.

    Raises:
        UsageError: an option makes no sense.
        DecantError: the cache cannot be audited.
    """
    from shared.recipe.file import load_recipe

    recipe = load_recipe(args.recipe, []) if args.recipe is not None else None
    given = {name: getattr(args, name) for name in ("targets", "teacher", "adapter", "student", "rows", "seed")}
    given["ks"] = None if args.k is None else [int(k) for k in _numbers(args.k, "k", 1, MAX_K, whole=True)]
    given["masses"] = None if args.mass is None else _numbers(args.mass, "mass", 1e-9, 1.0)
    given["temperatures"] = (
        None if args.temperatures is None else _numbers(args.temperatures, "temperatures", 1e-3, 1e3)
    )
    found = audit_cache(args.cache, settings_of(recipe, given))
    if recipe is not None:
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(recipe.output_dir / "audit.json", (json.dumps(found, indent=1) + "\n").encode(), "audit")
    return found, audit_text(found)


def audit_cache(path: Path, settings: AuditSettings) -> dict[str, Any]:
    """Audit a cache.

    Returns:
        path, layer, teacher, rows, rows_too_long, faithfulness, truncation (a list), completion, smaller_capture.

    Raises:
        CacheError: it is no cache, has no targets, or no row that the teacher can read.
        IdentityError: the teacher is not the recorded one.
        EngineError: a model cannot be loaded.
    """
    from tools.audit.faithfulness import audit_faithfulness
    from tools.audit.live import open_recorded_teacher
    from tools.audit.truncation import audit_truncation, candidates_of, smaller_capture

    cache = Cache.open(path, settings.targets, allow_partial=True)
    if cache.layer is None:
        raise CacheError(f"{path} holds no teacher distributions to audit; run `decant teach` first")
    if cache.layer.derived_from:
        raise CacheError(
            f"{path}: layer {cache.layer_name} was derived from {cache.layer.derived_from} in another tokenizer, which "
            "the teacher cannot score; audit the cache that it was derived from"
        )
    if cache.layer.dtype == "unknown":
        raise CacheError(
            f"{path}: layer {cache.layer_name} was imported, so that nothing tells the weights that made it, with "
            "which an audit scores rows again; audit a cache that `decant teach` made"
        )
    model = open_recorded_teacher(
        cache.layer, settings.teacher, settings.adapter, trust_remote_code=settings.trust_remote_code
    )
    student = _student(settings, cache)
    limits = [getattr(one.config, "max_position_embeddings", None) for one in (model, student) if one is not None]
    longest = min((limit for limit in limits if isinstance(limit, int)), default=None)
    drawn = random.Random(settings.seed).sample(range(len(cache)), min(settings.rows, len(cache)))
    chosen = sorted(index for index in drawn if longest is None or int(cache.num_tokens[index]) <= longest)
    if not chosen:
        raise CacheError(
            f"{path}: none of {len(drawn)} sampled rows can be read by the models; sample more with --rows"
        )
    temperatures = sorted({*cache.layer.temperatures, *settings.temperatures})
    candidates = candidates_of(cache, settings.ks, settings.masses, temperatures)
    truncation = audit_truncation(cache, model, chosen, candidates, student)
    return {
        "path": str(path),
        "layer": cache.layer_name,
        "teacher": cache.layer.teacher,
        "dtype": cache.layer.dtype,
        "temperatures": list(cache.layer.temperatures),
        "rows": len(chosen),
        "rows_too_long": len(drawn) - len(chosen),
        "faithfulness": audit_faithfulness(cache, model, chosen),
        "completion": settings.student or "mean of the teacher's distributions",
        "truncation": truncation,
        "smaller_capture": smaller_capture(truncation),
    }


def audit_text(found: Mapping[str, Any]) -> str:
    """Return an audit as tables for people."""
    faith = found["faithfulness"]
    lines = [
        f"{found['path']}, layer {found['layer']}: {found['rows']} rows, {faith['stored']['positions']:,} positions "
        f"scored again by {found['teacher']} ({found['dtype']})",
        *(
            [f"  {found['rows_too_long']} sampled rows are longer than the models read"]
            if found["rows_too_long"]
            else []
        ),
        "",
        "Faithfulness              mean KL    worst KL  worst log-prob  worst label  worst tail     top-1",
    ]
    for key, label in (
        ("stored", "stored against live"),
        ("control", "live against live"),
        ("codec", "live against encoded"),
    ):
        part = faith[key]
        top1 = "–" if part["top1_agreement"] is None else f"{100 * part['top1_agreement']:.2f} %"
        lines.append(
            f"  {label:21}  {part['mean_kl']:10.2e}  {part['worst_kl']:10.2e}  {part['worst_logprob']:14.2e}  "
            f"{part['worst_label']:11.2e}  {part['worst_tail']:10.2e}  {top1:>8}"
        )
    for row in faith["unfaithful"]:
        lines += [
            f"  UNFAITHFUL row {row['row']} ({row['where']}): mean KL {row['mean_kl']:.3f} nats, worst "
            f"{row['worst_kl']:.3f}",
            f"    at position {row['worst_position']}; worst label {row['worst_label']:.3f} nats, tail "
            f"{row['worst_tail']:.3f}",
        ]
    verdict = (
        f"{len(faith['unfaithful'])} of {found['rows']} rows are not the teacher's"
        if faith["unfaithful"]
        else "faithful"
    )
    lines += [f"  {verdict}", "", f"Truncation, tails completed by: {found['completion']}"]
    lines.append("       k  draws    mass     T  bytes/position  entries    KL lost  gradient error  of the mean")
    for one in found["truncation"]:
        lost, of_mean = ("–" if one[key] is None else f"{one[key]:.2e}" for key in ("kl_lost", "mean_gradient_error"))
        lines.append(
            f"{'*' if one['own'] else ' ':2}{one['k']:6}  {one['draws']:5}  {one['mass']:6g}  {one['temperature']:4g}  "
            f"{one['bytes_per_position']:14.1f}  {one['mean_entries']:7.1f}  {lost:>9}  {one['gradient_error']:14.2e}  "
            f"{of_mean:>11}"
        )
    at = sorted({one["temperature"] for one in found["truncation"]})
    own = "capture"
    if at != found["temperatures"]:  # a mass is covered at the highest temperature, which is another one here
        own = f"k and mass, captured at T = {', '.join(f'{t:g}' for t in at)} as all lines are"
    lines.append(f"  * the layer's own {own}; KL in nats per position; errors relative to the dense gradient")
    return "\n".join([*lines, *([f"  {found['smaller_capture']}"] if found["smaller_capture"] else [])])


def _numbers(text: str, option: str, least: float, most: float, *, whole: bool = False) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    sound = [number for number in numbers if least <= number <= most and (not whole or number == int(number))]
    if not numbers or len(sound) < len(numbers) or len(numbers) > MAX_TEMPERATURES:
        kind = "whole numbers" if whole else "numbers"
        raise UsageError(f"--{option} {text}: expected {kind} from {least:g} to {most:g} with commas between them")
    return numbers


def _student(settings: AuditSettings, cache: Cache) -> Any:
    if settings.student is None:
        return None
    from student_train.student.student import student_tokenizer_hash
    from teacher_cache.engines.transformers.transformers_model import CausalModel
    from teacher_cache.teacher.model_files import resolve_model

    files = resolve_model(settings.student)
    wanted = cache.sequences_identity.tokenizer_hash
    found = student_tokenizer_hash(str(files.directory), None, wanted, trust_remote_code=settings.trust_remote_code)
    if found is not None and found != wanted:
        raise IdentityError(
            f"{settings.student} has tokenizer {found} and {cache.path} has {wanted}; name another with --student DIR"
        )
    teacher = TransformersTeacher.model_validate(
        {
            "model": settings.student,
            "engine": "transformers",
            "dtype": "float32",
            "trust_remote_code": settings.trust_remote_code,
        }
    )
    model = CausalModel.load(teacher, files.directory)
    vocab_size = cache.layer.vocab_size if cache.layer else 0
    if model.num_entries < vocab_size:
        raise IdentityError(
            f"{settings.student} has {model.num_entries} entries in its head, the layer has {vocab_size}"
        )
    return model
