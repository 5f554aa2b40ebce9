"""A row's distributions over the teacher's tokens become distributions over the student's.

At a position where a student's token begins with one of the teacher's (alignment.py), each entry of the head gives its
mass to the student's token that its text begins with (vocabulary_map.py); what cannot be placed joins the bucket. What
follows is known on the path that the text took: where the teacher's token of the text may be joined by what follows,
the teacher's next distribution tells apart how, and so on (`_Walk`): the chain of the realised path. With "1" at 0.9,
then "2" at 0.8 and "." at 0.2, a student that joins digits gets "12" at 0.72 and "1" at 0.18. Positions inside a
teacher's token have no head.

Labels keep the teacher's likelihood of chunks: that of the whole chunk where it begins, 0 within it, -inf (not known)
where a chunk's bytes are not the same on both sides. So they sum up to the likelihood of the text.

Cost: one pass over the entries, and Python for positions whose token may be joined.

Shape letters: T teacher positions, S student positions, A common cuts, N head entries, J temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shared.payload.ragged import starts_of
from shared.payload.targets import Draws, SparseTargets
from tools.cache.translate.alignment import Alignment
from tools.cache.translate.vocabulary_map import BoundaryStability, VocabularyMap

MOST_TOKENS_OF_A_WALK = 12
LEAST_TAIL = 1e-12
"""Of a head that a walk completed: rounding leaves no less."""


@dataclass(frozen=True, slots=True, eq=False)
class RowPair:
    """One row in both tokenizers: the supervised tokens, and where both begin one."""

    teacher_ids: NDArray[np.int32]
    """[T] labels."""
    student_ids: NDArray[np.int32]
    """[S] labels."""
    spans: Sequence[tuple[int, int, int, Alignment]]
    """First teacher position, the one after the last, first student position, and the common cuts, of each span."""
    ends: tuple[int, int]
    """The end token of either side; -1 without one."""

    @property
    def cuts(self) -> NDArray[np.int64]:
        """[A, 5] teacher position, the one after the chunk, student position, the one after the chunk, is whole."""
        parts = [
            np.stack(
                [a.teacher + t, a.teacher_ends + t, a.student + s, a.student_ends + s, a.is_whole.astype(np.int64)], 1
            )
            for t, _, s, a in self.spans
        ]
        return np.concatenate(parts) if parts else np.zeros((0, 5), np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """Masses placed: flat, each with its cut."""

    cut: NDArray[np.int64]
    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    lost: NDArray[np.float64]
    """[A] mass that joins the bucket; below 0 where some left it."""


class Projection:
    """Carries rows over."""

    def __init__(self, vocabulary_map: VocabularyMap, stability: BoundaryStability, vocab_size: int, k: int) -> None:
        """Fix the tables; `vocab_size` is that of the teacher's layer, `k` the most entries of a position."""
        self.vocabulary_map, self.stability, self.k = vocabulary_map, stability, k
        missing = max(vocab_size - len(vocabulary_map.ids), 0)
        self._ids = np.append(vocabulary_map.ids, np.full(missing, -1, np.int32)).astype(np.int64)
        self._is_all = np.append(vocabulary_map.is_all, np.zeros(missing, np.bool_))
        self._lengths = np.array([len(octets or b"") for octets in vocabulary_map.student.octets])
        self._teacher_lengths = np.array([len(vocabulary_map.teacher_bytes(i)) for i in range(len(self._ids))])

    def row(self, targets: SparseTargets, pair: RowPair) -> SparseTargets:
        """Return the row's targets in the student's tokens, at temperature 1 and without draws."""
        cuts, num_positions = pair.cuts, len(pair.student_ids)
        unit = targets.temperatures.index(1.0)
        walks = self._needs_walk(pair, cuts)
        plain = self._plain(targets, pair, cuts, ~walks)
        walked = self._walked(targets, pair, cuts, walks, unit)
        cut = np.concatenate([plain.cut, walked.cut])
        ids, logprobs = np.concatenate([plain.ids, walked.ids]), np.concatenate([plain.logprobs, walked.logprobs])
        order = np.lexsort((np.arange(len(cut)), -logprobs, cut))
        ids, logprobs = ids[order], logprobs[order]
        lost = plain.lost + walked.lost
        counts, tails = np.zeros(num_positions, np.int32), np.zeros((num_positions, 1), np.float32)
        found = np.bincount(cut, minlength=len(cuts))
        counts[cuts[:, 2]] = found
        tail = targets.tail_logmass[cuts[:, 0], unit]
        moved = np.log(np.clip(np.exp(tail.astype(np.float64)) + lost, LEAST_TAIL, 1.0))
        tails[cuts[:, 2], 0] = np.where(found > 0, np.where(lost != 0, moved, tail), 0.0)
        labels = _labels(targets.label_logprobs, cuts, num_positions)
        return SparseTargets(counts, ids.astype(np.int32), logprobs.astype(np.float32), labels, tails)

    def _needs_walk(self, pair: RowPair, cuts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return [A] where the token of the text may be joined by what follows, or a prefix space stands."""
        leads = np.zeros(len(cuts), np.bool_)
        for t, _, s, found in pair.spans:
            if found.teacher_lead or found.student_lead:
                leads |= (cuts[:, 0] == t) & (cuts[:, 2] == s)
        told, ours = pair.teacher_ids[cuts[:, 0]], pair.student_ids[cuts[:, 2]]
        landed = self._ids[told]
        is_longer = (self._lengths[ours] > self._teacher_lengths[told]) & (ours != pair.ends[1])
        joined = self._is_all[told] & (landed >= 0) & self.stability.is_joined[landed] & (told != pair.ends[0])
        needs: NDArray[np.bool_] = leads | joined | ((cuts[:, 4] > 0) & is_longer)
        return needs

    def _plain(
        self, targets: SparseTargets, pair: RowPair, cuts: NDArray[np.int64], chosen: NDArray[np.bool_]
    ) -> _Entries:
        """Place the heads of the chosen cuts, entry by entry."""
        at = np.flatnonzero(chosen)
        counts = targets.counts[cuts[at, 0]].astype(np.int64)
        first = np.repeat(starts_of(targets.counts)[cuts[at, 0]], counts)
        source = first + np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
        cut, said = np.repeat(at, counts), targets.ids[source]
        logprobs = targets.logprobs[source].astype(np.float64)
        ids = self._ids[said]
        weight = np.where(ids < 0, 0.0, np.where(self._is_all[said], self.stability.share[ids], 1.0))
        is_told = (said == pair.teacher_ids[cuts[cut, 0]]) & (cuts[cut, 4] > 0)
        for where, to in ((said == pair.ends[0], pair.ends[1]), (is_told, pair.student_ids[cuts[cut, 2]])):
            ids, weight = np.where(where, to, ids), np.where(where, 1.0, weight)
        lost = np.bincount(cut, (1.0 - weight) * np.exp(logprobs), minlength=len(cuts)).astype(np.float64)
        kept = (weight > 0) & (logprobs > -700)
        with np.errstate(divide="ignore"):
            return _Entries(*_summed(cut[kept], ids[kept], logprobs[kept] + np.log(weight[kept])), lost)

    def _walked(
        self, targets: SparseTargets, pair: RowPair, cuts: NDArray[np.int64], chosen: NDArray[np.bool_], unit: int
    ) -> _Entries:
        """Place the heads of the chosen cuts along the path of the text."""
        lost = np.zeros(len(cuts))
        where: list[int] = []
        ids: list[int] = []
        masses: list[float] = []
        walk = _Walk(self, targets, pair, unit)
        for at in np.flatnonzero(chosen).tolist():
            span = next(span for span in pair.spans if span[0] <= cuts[at, 0] < span[1])
            found = walk.from_cut(cuts[at], span)
            kept = sorted(found.items(), key=lambda item: -item[1])[: self.k]
            begin = float(np.exp(np.float64(targets.tail_logmass[cuts[at, 0], unit])))
            lost[at] = 1.0 - begin - math.fsum(mass for _, mass in kept)
            where += [at] * len(kept)
            ids += [i for i, _ in kept]
            masses += [mass for _, mass in kept]
        return _Entries(np.array(where, np.int64), np.array(ids, np.int64), np.log(np.array(masses, np.float64)), lost)


class _Walk:
    """The teacher's distributions along one row's text."""

    def __init__(self, projection: Projection, targets: SparseTargets, pair: RowPair, unit: int) -> None:
        self._map, self._stability, self._pair = projection.vocabulary_map, projection.stability, pair
        self._targets, self._unit, self._offsets = targets, unit, targets.offsets()

    def from_cut(self, cut: NDArray[np.int64], span: tuple[int, int, int, Alignment]) -> dict[int, float]:
        """Return the mass of each student token where one begins."""
        first, end, _, alignment = span
        is_first = int(cut[0]) == first
        self._end = end if cut[4] else 0
        self._label = int(self._pair.student_ids[cut[2]]) if cut[4] else -1
        self._label_bytes = self._map.student_bytes(self._label) if cut[4] else b""
        text = b" " if is_first and alignment.student_lead else b""
        found: dict[int, float] = {}
        self._place(int(cut[0]), text, 1.0, found, 0, strips=is_first and alignment.teacher_lead > 0)
        return {i: mass for i, mass in found.items() if mass > 0}

    def _place(self, t: int, text: bytes, mass: float, found: dict[int, float], depth: int, *, strips: bool) -> None:
        """Share out `mass`, that of having come to position t with `text` since the cut."""
        here: dict[int, float] = {}
        ids, probabilities, tail = self._head(t)
        for said, probability in zip(ids, probabilities, strict=True):
            share = mass * probability
            if said == self._pair.ends[0] or said in self._map.teacher.special:
                to = self._map.first(text) if depth else self._control(said)
                here[to] = here.get(to, 0.0) + share
                continue
            more = self._map.teacher_bytes(said)
            if strips and more[:1] != b" ":
                continue
            self._land(t, text + more[strips:], share, here, depth, is_told=said == self._pair.teacher_ids[t])
        head = mass * (1.0 - tail)
        stays = self._map.first(text) if depth else -1
        if stays >= 0 and head > 0:  # the tail is taken to go on as the head does
            here[stays] = here.get(stays, 0.0) * (1.0 + mass * tail / head)
        for to, share in here.items():
            if to >= 0:
                found[to] = found.get(to, 0.0) + share

    def _land(self, t: int, text: bytes, share: float, here: dict[int, float], depth: int, *, is_told: bool) -> None:
        """Give a text's mass to the token that it begins with, or go on where more of it is known."""
        knows = is_told and self._label >= 0
        reaches = knows and len(self._label_bytes) <= len(text) and text.startswith(self._label_bytes)
        to = self._label if reaches else self._map.first(text)
        is_all = to >= 0 and len(self._map.student_bytes(to)) == len(text)
        may_join = is_all and bool(self._stability.is_joined[to])
        goes_on = is_told and t + 1 < self._end and depth < MOST_TOKENS_OF_A_WALK
        if goes_on and (may_join or not text or (knows and len(self._label_bytes) > len(text))):
            self._place(t + 1, text, share, here, depth + bool(text), strips=False)
        elif to >= 0:
            weight = float(self._stability.share[to]) if is_all and (may_join or not is_told) else 1.0
            here[to] = here.get(to, 0.0) + share * weight

    def _control(self, said: int) -> int:
        """Return the student's control token for one of the teacher's; -1 where there is none."""
        return self._pair.ends[1] if said == self._pair.ends[0] else int(self._map.ids[said])

    def _head(self, t: int) -> tuple[list[int], list[float], float]:
        """Return ids, probabilities and the tail's mass at teacher position t, the token of the text among them."""
        where = slice(int(self._offsets[t]), int(self._offsets[t + 1]))
        ids = self._targets.ids[where].tolist()
        probabilities = np.exp(self._targets.logprobs[where].astype(np.float64)).tolist()
        tail = float(np.exp(np.float64(self._targets.tail_logmass[t, self._unit])))
        told = int(self._pair.teacher_ids[t])
        if told not in ids:
            mass = min(float(np.exp(np.float64(self._targets.label_logprobs[t]))), tail)
            ids, probabilities, tail = [*ids, told], [*probabilities, mass], tail - mass
        return ids, probabilities, tail


def renamed(targets: SparseTargets, ids: NDArray[np.int32]) -> SparseTargets:
    """Return targets under other ids, everything else as it is; `ids` [V] gives each id its new one."""

    def draws(drawn: Draws) -> Draws:
        new = ids[drawn.ids]
        order = np.lexsort((new, np.repeat(np.arange(len(drawn.counts)), drawn.counts)))
        return Draws(drawn.counts, new[order], drawn.multiplicities[order])

    return replace(targets, ids=ids[targets.ids], draws=tuple(map(draws, targets.draws)))


def _labels(logprobs: NDArray[np.float32], cuts: NDArray[np.int64], num_positions: int) -> NDArray[np.float32]:
    """Return [S] log-likelihoods of chunks where they begin, 0 within them, -inf where they are not known."""
    labels = np.full(num_positions, -np.inf, np.float32)
    for teacher, teacher_end, student, student_end, is_whole in cuts.tolist():
        if is_whole:
            labels[student:student_end] = 0.0
            labels[student] = logprobs[teacher:teacher_end].sum(dtype=np.float64)
    return labels


def _summed(
    cut: NDArray[np.int64], ids: NDArray[np.int64], logprobs: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Add up the masses of entries of one cut with one id; entries keep their order and, alone, their very value."""
    if not len(cut):
        return cut, ids, logprobs
    order = np.lexsort((np.arange(len(cut)), ids, cut))
    is_new = np.append(True, (cut[order][1:] != cut[order][:-1]) | (ids[order][1:] != ids[order][:-1]))
    firsts = np.flatnonzero(is_new)
    sums = np.log(np.add.reduceat(np.exp(logprobs[order]), firsts))
    alone = np.diff(np.append(firsts, len(order))) == 1
    values = np.where(alone, logprobs[order][firsts], sums)
    back = np.argsort(order[firsts], kind="stable")
    at = order[firsts][back]
    return cut[at], ids[at], values[back]
