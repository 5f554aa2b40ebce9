"""Who answers the prompts: the teacher itself, or the model of `generate.model`, such as a student whose answers are to
be scored.

Another model answers through the same engine kind and settings as the teacher, without the teacher's adapter and
quantisation, and with prompts in the teacher's template, because that is what a student of this cache will see. Its
tokenizer must be the teacher's. Its engine is closed before the teacher's opens, so each has the machine to itself. Its
identity is part of every row_key, so answers of both models to one prompt are different rows. So are those of two
teachers: the answers that a cache began with have row_keys without the teacher, any other teacher's hold its weights.
Cost: the other model's tokenizer is loaded once; its weights are sampled, not read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from shared.cache.layout import read_header
from shared.errors import EngineError, IdentityError
from shared.identity.weights_hash import weights_hash
from shared.parts.jobs import list_jobs
from shared.recipe.recipe import Generate, Teacher
from shared.recipe.sections.teacher import on_engine
from teacher_cache.teacher.model_files import resolve_model
from teacher_cache.teacher.teacher_identity import KnownTeacher, answerer_of, know_teacher


@dataclass(frozen=True, slots=True)
class Answerer:
    """The model that answers prompts."""

    section: Teacher
    """How its engine is opened."""
    known: KnownTeacher
    """Its files, and the longest sequence that both models take."""
    key: str | None
    """What of it enters a row_key; None where the cache began with its answers."""
    is_teacher: bool

    @classmethod
    def beside(cls, section: Teacher, known: KnownTeacher) -> Answerer:
        """Return a model that answers beside the teacher, with sequences as long as `known` says."""
        return cls(section.model_copy(update={"max_model_len": known.max_model_len}), known, known.weights_hash, False)


def know_answerer(generate: Generate | None, teacher: Teacher, known: KnownTeacher) -> Answerer:
    """Read the files of the model that answers.

    Args:
        generate: the recipe's section; without one, or without a model in it, the teacher answers.
        teacher: the recipe's teacher.
        known: its files.

    Raises:
        IdentityError: the other model writes with another tokenizer.
        EngineError: its files are missing or broken.
    """
    if generate is None or generate.model is None:
        return Answerer(teacher.model_copy(update={"max_model_len": known.max_model_len}), known, None, True)
    alone = {"model": generate.model, "revision": None, "adapter": None, "quantization": None, "max_model_len": None}
    section = on_engine(teacher.engine, teacher, **alone)
    try:
        other = know_teacher(section)
    except EngineError as error:
        raise EngineError(f"generate.model: {error}") from error
    if other.tokenizer_hash != known.tokenizer_hash:
        raise IdentityError(
            f"generate.model {generate.model} has another tokenizer (hash {other.tokenizer_hash[:8]}) than the teacher "
            f"{teacher.model} ({known.tokenizer_hash[:8]}), so its tokens cannot be scored; expected a model of the "
            "same family"
        )
    if other.vocab_size > known.vocab_size:
        raise IdentityError(
            f"generate.model {generate.model} can answer with {other.vocab_size:,} tokens and the teacher "
            f"{teacher.model} knows {known.vocab_size:,}; expected a model of the same family"
        )
    return Answerer.beside(section, replace(other, max_model_len=min(other.max_model_len, known.max_model_len)))


def answerer_key(generate: Generate | None, teacher: Teacher | None, cache: Path) -> str | None:
    """Return what of the model that answers enters a row_key of a cache, from its files alone; None for the teacher
    whose answers the cache began with.

    Raises:
        EngineError: it is neither a model directory nor a hub id that can be fetched.
    """
    if generate is not None and generate.model is not None:
        return weights_hash(resolve_model(generate.model).directory)
    if generate is None or teacher is None or not (cache / "cache.json").is_file():
        return None
    adapter = None if teacher.adapter is None else weights_hash(Path(teacher.adapter))
    weights = weights_hash(resolve_model(teacher.model, teacher.revision).directory)
    return key_beside(answerer_of({"weights": weights, "adapter": adapter}), cache)


def key_beside(answerer: str, cache: Path) -> str | None:
    """Return what of a teacher enters the row_keys of its answers in a cache: nothing where the cache began with them.

    Raises:
        DamagedError: a file of the cache contradicts the format.
    """
    began = read_header(cache).identity.answerer
    jobs = [] if began else [job.request for job in list_jobs(cache)]
    answered = [request for request in jobs if request.get("generator") and "answerer" not in request]
    without = {began} if began else {answerer_of(request["generator"]) for request in answered}
    return None if not without or answerer in without else answerer
