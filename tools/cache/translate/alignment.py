"""Where do two tokenizations of one text cut it at the same byte?

Both are lists of byte strings. Their joined bytes should be equal; one of them may begin with a space that the other
lacks (the prefix space of SentencePiece), and where a tokenizer changed the text (normalisation, lone bytes) only the
equal beginning and the equal end are compared. A *chunk* is what lies between two common cuts that follow one another:
some tokens of one against some of the other. Cost: linear in the bytes.

Shape letters: N teacher tokens, M student tokens, A common cuts where a token begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """Common cuts of two tokenizations, the first at their beginning."""

    teacher: Indices
    """[A] index of the teacher's token that begins at each cut."""
    student: Indices
    """[A] index of the student's token that begins there."""
    teacher_ends: Indices
    """[A] index after the chunk's last teacher token."""
    student_ends: Indices
    """[A] index after the chunk's last student token."""
    is_whole: NDArray[np.bool_]
    """[A] the chunk's tokens stand for the same bytes on both sides."""
    teacher_lead: int
    """Bytes (0 or 1) of prefix space that the teacher's first token alone has."""
    student_lead: int
    """Bytes (0 or 1) of prefix space that the student's first token alone has."""


def align(teacher: Sequence[bytes], student: Sequence[bytes]) -> Alignment:
    """Return the common cuts of two tokenizations of one text.

    >>> found = align([b"1", b"2", b" is"], [b"12", b" ", b"is"])
    >>> found.teacher.tolist(), found.student.tolist(), found.student_ends.tolist(), found.is_whole.tolist()
    ([0, 2], [0, 1], [1, 3], [True, True])
    """
    ours, theirs = b"".join(student), b"".join(teacher)
    student_lead, teacher_lead = int(_has_lead(ours, theirs)), int(_has_lead(theirs, ours))
    ours, theirs = ours[student_lead:], theirs[teacher_lead:]
    cuts, teacher_cuts = _cuts(student, student_lead), _cuts(teacher, teacher_lead)
    is_prefix, is_suffix, mapped = _mapped(cuts, ours, theirs)
    place = np.searchsorted(teacher_cuts, mapped)  # of equal cuts (a token without bytes) the first
    is_common = (is_prefix | is_suffix) & (teacher_cuts[np.minimum(place, len(teacher))] == mapped)
    is_common[1:] &= cuts[1:] != cuts[:-1]
    at = np.flatnonzero(is_common)
    reaches_end = bool(cuts[at[-1]] == cuts[-1])
    ends = np.append(at[1:], len(student))
    teacher_ends = np.append(place[at[1:]], len(teacher))
    teacher_ends[teacher_cuts[teacher_ends] == teacher_cuts[-1]] = len(teacher)
    whole = (is_prefix[at] & is_prefix[ends]) | (is_suffix[at] & is_suffix[ends])
    whole[-1] = False  # nothing follows, or the text is over
    if reaches_end and len(at) > 1:
        ends[-2] = len(student)
    begins = (place[at] < len(teacher)) & (at < len(student)) & (cuts[at] < cuts[-1])
    return Alignment(
        place[at][begins],
        at[begins],
        teacher_ends[begins],
        ends[begins],
        whole[begins],
        teacher_lead,
        student_lead,
    )


def _has_lead(text: bytes, other: bytes) -> bool:
    """Tell whether a text begins with a space that the other lacks."""
    return text == b" " + other or (text[:1] == b" " and other[:1] != b" ")


def _cuts(tokens: Sequence[bytes], lead: int) -> Indices:
    """Return [N + 1] offsets at which tokens begin and the last one ends, a prefix space not counted."""
    return np.maximum(np.cumsum([0, *map(len, tokens)], dtype=np.int64) - lead, 0)


def _mapped(cuts: Indices, ours: bytes, theirs: bytes) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Indices]:
    """Return which cuts lie in the equal beginning and in the equal end, and where they are in the other's bytes; -1 in
    neither.
    """
    if ours == theirs:
        every = np.ones(len(cuts), np.bool_)
        return every, every, cuts
    prefix = _num_equal(ours, theirs)
    room = min(len(ours), len(theirs)) - prefix
    suffix = _num_equal(ours[::-1][:room], theirs[::-1][:room])
    is_prefix = cuts <= prefix
    is_suffix = ~is_prefix & (cuts >= len(ours) - suffix)
    mapped = np.where(is_prefix, cuts, np.where(is_suffix, cuts + len(theirs) - len(ours), -1))
    return is_prefix, is_suffix, mapped


def _num_equal(one: bytes, other: bytes) -> int:
    """Return how many bytes both begin with."""
    size = min(len(one), len(other))
    differ = np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size)
    return int(differ.argmax()) if differ.any() else size
