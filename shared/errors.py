"""What can go wrong, in one tree, so that a caller catches as much or as little as it wants.

Every message is one sentence: what was found, where (path:line or part:row), what was expected, what to do. The command
line prints it without a traceback and leaves with `exit_code`: 1 the work failed, 2 the request was wrong. Paths and
names of strangers in it may hold line breaks, which are shown as escapes: no second line can be forged.
"""

from __future__ import annotations

import errno
from typing import ClassVar

from shared.places import with_urls, without_passwords


class DecantError(Exception):
    """Base of every error that a user can meet."""

    exit_code: ClassVar[int] = 1
    has_lines: ClassVar[bool] = False
    """Whether the message may be a list of sentences, each on its line."""

    def __str__(self) -> str:
        """Return the message, caches that mirror a URL called by it, without passwords of addresses."""
        text = without_passwords(with_urls(super().__str__()))
        return text if self.has_lines else on_one_line(text)


class UsageError(DecantError):
    """The request itself is wrong: an unknown option, a combination that cannot be honoured."""

    exit_code: ClassVar[int] = 2


class RecipeError(UsageError):
    """The recipe does not say something that Decant can do; the message names file and line."""


class RecipeProblemsError(RecipeError):
    """Every problem of a recipe, each on its line."""

    has_lines: ClassVar[bool] = True


class PromptError(DecantError):
    """Prompts or answers cannot be read, split into spans or used; the message names path and line."""


class CacheError(DecantError):
    """A cache cannot be opened, read or written."""


class DamagedError(CacheError):
    """Bytes on disk are not what was committed: truncated, altered or not a cache at all."""


class IdentityError(CacheError):
    """Two things that must be equal are not: teacher, tokenizer or capture settings."""


class EngineError(DecantError):
    """The teacher's engine cannot start, cannot do what was asked, or died."""


class TrainingError(DecantError):
    """Training cannot start or must stop."""


class EvaluationError(DecantError):
    """A model cannot be evaluated or a report cannot be built."""


class NamingError(CacheError, EvaluationError):
    """What a command names is not there or not meant: no cache, run or export, none of its layers, jobs, sources or
    rows, or a new place that holds something else.
    """

    exit_code: ClassVar[int] = 2


class ModelError(EngineError, TrainingError, EvaluationError):
    """A model, tokenizer or adapter that the recipe names is not there, not whole or of another kind, whoever wanted to
    load it.
    """

    exit_code: ClassVar[int] = 2


def on_one_line(text: str) -> str:
    r"""Return a text with its line breaks written as escapes.

    >>> on_one_line("no cache: a\nb")
    'no cache: a\\nb'
    """
    return text.replace("\n", "\\n")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def reason_of(error: BaseException, most: int = 300) -> str:
    r"""Return another library's message as one line of at most so many characters, or its type where it has none.

    >>> reason_of(OSError("no\n  space")), reason_of(MemoryError()), reason_of(KeyError("id"))
    ('no space', 'MemoryError', "no 'id'")
    """
    text = " ".join(str(error).split())[:most] or type(error).__name__
    return f"no {text}" if isinstance(error, KeyError) and " " not in text else text


_WAYS_OUT = {
    "there is a file where a directory is needed, so name another path": (errno.EEXIST, errno.ENOTDIR),
    "there is a directory where a file is needed, so name another path": (errno.EISDIR,),
    "restore it from a copy or correct the path": (errno.ENOENT,),
    "correct its permissions or name another path": (errno.EACCES, errno.EPERM, errno.EROFS),
    "free some space or lift the limit": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "name a shorter path": (errno.ENAMETOOLONG,),
    "take the links out that lead in a circle": (errno.ELOOP,),
    "allow more open files (`ulimit -n`)": (errno.EMFILE, errno.ENFILE),
    "check the disk that it is on": (errno.EIO, errno.ESTALE),
}


def refused(error: OSError) -> str:
    """Return what the system said of a file and what to do about it.

    >>> refused(PermissionError(13, "Permission denied"))
    'Permission denied; correct its permissions or name another path'
    """
    way_out = next((text for text, numbers in _WAYS_OUT.items() if error.errno in numbers), None)
    return "; ".join(filter(None, [error.strerror or reason_of(error), way_out]))


def is_panic(error: BaseException) -> bool:
    """Tell whether a library written in Rust gave up: what it raises then is no `Exception`."""
    return type(error).__name__ == "PanicException"
