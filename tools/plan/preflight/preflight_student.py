"""What is known to be wrong with the student before any work: its files, weights, tokenizer and adapter."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from shared.cache.layout import read_header
from shared.cache.tokenizer_files import read_tokenizer_files
from shared.errors import DecantError
from shared.identity.weights_hash import tokenizer_hash
from shared.models.config_file import read_config
from shared.models.files import load_config
from shared.models.type_tokenizer import require_unchanged
from shared.places import named
from shared.recipe.base import Problem
from shared.tokens.tokenizer_file import num_ids, plain_tokenizer
from tools.plan.preflight.preflight_asked import Asked, said
from tools.plan.preflight.preflight_models import files_of_tokenizer, hash_of_tokenizer, model_problem


def student_problems(asked: Asked) -> Iterator[Problem]:
    """Check the student's files, and that its tokens are those of the cache or the teacher."""
    recipe, student = asked.recipe, asked.recipe.student
    if student is None:
        return
    random = student.init == "random"
    weights = not random and not asked.plans_only and any(stage.init_from == "base" for stage in recipe.stages)
    stated = asked.plans_only and recipe.assume.student is not None
    problem = model_problem(student.model, student.revision, weights=weights, stated=stated)
    if problem:
        yield ("student", "model"), problem
    elif Path(student.model).is_dir():
        found = list(_tokenizer(asked, Path(student.model), required=not random))
        for check in () if found else (_check_stored, _check_type, _check_rows):
            yield from said(("student", "model"), partial(check, asked, Path(student.model)))
        yield from found
    if random and student.adapter.holds_4_bits:
        yield ("student", "adapter"), "qlora holds weights in 4 bits and `init: random` makes fresh ones; use none"


def _tokenizer(asked: Asked, directory: Path, *, required: bool) -> Iterator[Problem]:
    teacher, student = asked.recipe.teacher, asked.recipe.student
    assert student is not None
    own = directory / "tokenizer.json"
    if not own.is_file():
        if required and not any(directory.glob("*tokenizer*")) and not any(directory.glob("vocab.*")):
            yield ("student", "model"), f"'{directory}' has no tokenizer.json; copy the teacher's tokenizer to it"
        return
    if asked.caches:
        wanted, whose = read_header(asked.caches[0]).identity.tokenizer_hash, f"the cache {asked.caches[0]}"
    elif teacher is not None and (path := Path(teacher.model) / "tokenizer.json").is_file():
        wanted, whose = tokenizer_hash(path.read_bytes(), path), "the teacher"
    else:
        return
    found = tokenizer_hash(own.read_bytes(), own)
    if found == wanted:
        return

    def compare() -> None:
        """Compare the whole tokenizers, where their files differ."""
        theirs = wanted
        if not asked.caches:
            assert teacher is not None
            theirs = hash_of_tokenizer(teacher.model, trusts=teacher.trust_remote_code)
        mine = hash_of_tokenizer(str(directory), trusts=student.trust_remote_code)
        if theirs not in (mine, found):
            cache = shlex.quote(named(asked.caches[0])) if asked.caches else "CACHE"
            after = "" if asked.caches else "build the cache (`decant teach`) and "
            words = shlex.quote(str(directory))
            raise DecantError(
                f"'{directory}' has tokenizer {mine[:8]} and {whose} has {theirs[:8]}; choose a student with the same "
                f"tokenizer, or {after}train from one in the student's tokens (docs/tokenizers.md): "
                f"`decant cache translate {cache} OUT --tokenizer {words}`, then "
                f"`decant init NAME --cache OUT --student {words}`"
            )

    yield from said(("student", "model"), compare)


def _check_stored(asked: Asked, directory: Path) -> None:
    """Refuse a student that is stored in a form that cannot be trained, or not be opened, now or once it is trained."""
    from student_train.student.stored_weights import refuse_quantised, refuse_unopened_text_model

    stored = read_config(directory / "config.json")
    refuse_quantised(directory, stored)
    student = asked.recipe.student
    if student is not None:
        trust = student.trust_remote_code
        refuse_unopened_text_model(directory, load_config(directory, what="the student", trust_remote_code=trust))


def _check_type(asked: Asked, directory: Path) -> None:
    """Refuse a student of a type that transformers reads the cache's tokenizer otherwise for.

    Raises:
        IdentityError: with the type and a text that shows it.
    """
    teacher, kind = asked.recipe.teacher, _type_of(directory)
    if kind is None or (teacher is not None and _type_of(Path(teacher.model)) == kind):
        return
    if asked.caches:
        files = read_tokenizer_files(asked.caches[0])
    elif teacher is not None and Path(teacher.model).is_dir():
        files = files_of_tokenizer(teacher.model, trusts=teacher.trust_remote_code)
    else:
        return
    require_unchanged(files, kind, str(directory))


def _check_rows(asked: Asked, directory: Path) -> None:
    """Refuse a student whose output layer has fewer rows than there are tokens.

    Raises:
        DecantError: with both numbers.
    """
    from teacher_cache.teacher.model_files import resolve_model

    file = None if asked.recipe.teacher is None else Path(asked.recipe.teacher.model, "tokenizer.json")
    if asked.caches:
        tokens, whose = read_header(asked.caches[0]).identity.vocab_size, f"the cache {asked.caches[0]}"
    elif file is not None and file.is_file():
        tokens, whose = num_ids(plain_tokenizer(file.read_bytes(), str(file))), "the teacher's tokenizer"
    else:
        return
    rows = resolve_model(str(directory)).vocab_size
    if rows < tokens:
        raise DecantError(
            f"'{directory}' has {rows:,} rows in its output layer (`vocab_size` of its config.json) where {whose} has "
            f"{tokens:,} tokens; choose a student whose vocabulary is at least as large"
        )


def _type_of(directory: Path) -> str | None:
    path = directory / "config.json"
    found = read_config(path).get("model_type") if path.is_file() else None
    return found if isinstance(found, str) else None
