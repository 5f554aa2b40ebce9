"""Projected heads equal brute force over the whole vocabulary where every boundary coincides; digits follow a path."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from shared.payload.targets import SparseTargets
from shared.tokens.token_bytes import read_vocabulary
from tests.shared.dense_targets import cut, equal_targets, log_softmax
from tests.tools.translate.student_tokenizers import permuted, student_tokenizer
from tools.cache.translate.alignment import align
from tools.cache.translate.projection import Projection, RowPair, renamed
from tools.cache.translate.vocabulary_map import BoundaryStability, VocabularyMap

NO_END = (-1, -1)


def vocabulary_map_of(teacher: Tokenizer, student: Tokenizer) -> VocabularyMap:
    return VocabularyMap(teacher.to_str().encode(), student.to_str().encode())


def pair_of(
    vocabulary_map: VocabularyMap, teacher_ids: list[int], student_ids: list[int], ends: tuple[int, int] = NO_END
) -> RowPair:
    told, said = (
        [vocabulary_map.teacher_bytes(i) for i in teacher_ids],
        [vocabulary_map.student_bytes(i) for i in student_ids],
    )
    spans = [(0, len(teacher_ids), 0, align(told, said))]
    return RowPair(np.array(teacher_ids, np.int32), np.array(student_ids, np.int32), spans, ends)


def never_joined(size: int) -> BoundaryStability:
    return BoundaryStability(np.ones(size, np.int64), np.ones(size, np.int64))


def dense_targets(logits: np.ndarray, labels: list[int], k: int) -> SparseTargets:
    logprobs = log_softmax(logits)
    order = np.argsort(-logprobs, axis=1)[:, :k]
    head = np.take_along_axis(logprobs, order, 1)
    tail = np.log(np.maximum(1.0 - np.exp(head).sum(1), 0.0) + 1e-300)
    tail[tail < -50] = -np.inf
    return SparseTargets(
        np.full(len(labels), k, np.int32),
        order.ravel().astype(np.int32),
        head.ravel().astype(np.float32),
        logprobs[np.arange(len(labels)), labels].astype(np.float32),
        tail[:, None].astype(np.float32),
    )


def heads(targets: SparseTargets) -> list[dict[int, float]]:
    offsets = targets.offsets()
    masses = np.exp(targets.logprobs.astype(np.float64))
    return [
        dict(zip(targets.ids[a:b].tolist(), masses[a:b].tolist(), strict=True))
        for a, b in itertools.pairwise(offsets.tolist())
    ]


@pytest.mark.parametrize("student", ["single digits", "spaces", "unigram"])
def test_head_is_that_of_brute_force_where_every_boundary_coincides(student: str) -> None:
    teacher = student_tokenizer("joined digits", 420)
    other = student_tokenizer(student, 330 if student != "spaces" else 420)
    vocabulary_map = vocabulary_map_of(teacher, other)
    vocabulary = read_vocabulary(other.to_str().encode())
    # words that both write as one token, so that the text is cut alike
    pieces = [
        b
        for i, b in enumerate(vocabulary_map.teacher.octets)
        if i not in vocabulary_map.teacher.special and b and b.isalpha()
    ]
    shared = [
        b.decode()
        for b in pieces
        if len(teacher.encode(b.decode()).ids) == 1 and vocabulary_map.student_ids(b) is not None
    ]
    words = [word for word in shared if len(vocabulary_map.student_ids(word.encode())) == 1][:8]
    assert len(words) == 8
    told = [teacher.encode(word).ids[0] for word in words]
    said = [vocabulary_map.student_ids(word.encode())[0] for word in words]
    rng = np.random.default_rng(0)
    size = len(vocabulary_map.teacher)
    logits = rng.normal(0, 3, (len(told), size))
    projection = Projection(vocabulary_map, never_joined(len(vocabulary_map.student)), size, size)
    found = projection.row(dense_targets(logits, told, size), pair_of(vocabulary_map, told, said))
    masses = np.exp(log_softmax(logits))
    for s, head in enumerate(heads(found)):
        expected = np.zeros(len(vocabulary_map.student))
        lost = 0.0
        for v in range(size):
            octets = vocabulary_map.teacher.octets[v]
            if v in vocabulary_map.teacher.special:
                same = [i for i in vocabulary.special if vocabulary.pieces[i] == vocabulary_map.teacher.pieces[v]]
                first = same[0] if same else -1
            else:
                first = (vocabulary_map.student_ids(octets) or [-1])[0] if octets else -1
            if v == told[s]:
                first = said[s]
            if first < 0 or (first in vocabulary.special) != (v in vocabulary_map.teacher.special):
                lost += masses[s, v]
            else:
                expected[first] += masses[s, v]
        assert set(head) == set(np.flatnonzero(expected > 0).tolist())
        np.testing.assert_allclose([head[i] for i in sorted(head)], expected[sorted(head)], rtol=1e-5)
        np.testing.assert_allclose(np.exp(found.tail_logmass[s, 0]), lost, atol=1e-6)
    np.testing.assert_array_equal(found.label_logprobs, dense_targets(logits, told, 4).label_logprobs)


def digits(merges: list[str], size: int = 12) -> Tokenizer:
    """A byte-level tokenizer over digits and a dot, with some digits joined."""
    vocab = {piece: i for i, piece in enumerate("0123456789.")}
    pairs = []
    for merge in merges:
        vocab[merge] = len(vocab)
        pairs.append([merge[:-1], merge[-1]])
    document = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs, "byte_fallback": False},
    }
    return Tokenizer.from_str(json.dumps(document))


def sparse(*positions: dict[str, float], labels: str, teacher: Tokenizer) -> SparseTargets:
    """Targets from probabilities by token text; what is missing to 1 is the tail."""
    heads = [sorted(p.items(), key=lambda item: -item[1]) for p in positions]
    vocab = teacher.get_vocab()
    return SparseTargets(
        np.array([len(head) for head in heads], np.int32),
        np.array([vocab[text] for head in heads for text, _ in head], np.int32),
        np.log([p for head in heads for _, p in head]).astype(np.float32),
        np.log([dict(head)[label] for head, label in zip(heads, labels.split(), strict=True)]).astype(np.float32),
        np.log(np.array([[max(1 - sum(p.values()), 1e-9)] for p in positions])).astype(np.float32),
    )


def test_digits_of_the_teacher_that_the_student_joins_follow_the_path_of_the_text() -> None:
    teacher, student = digits([]), digits(["12", "13", "123"])
    vocabulary_map = vocabulary_map_of(teacher, student)
    ids = student.get_vocab()
    stability = BoundaryStability(np.full(len(ids), 10, np.int64), np.full(len(ids), 10, np.int64))
    stability = BoundaryStability(
        stability.seen, np.where(np.isin(np.arange(len(ids)), [ids["1"], ids["12"], ids["7"]]), 4, 10)
    )
    targets = sparse(
        {"1": 0.9, "7": 0.06, ".": 0.04},
        {"2": 0.8, "3": 0.1, ".": 0.1},
        {".": 0.75, "3": 0.25},
        labels="1 2 .",
        teacher=teacher,
    )
    pair = pair_of(vocabulary_map, teacher.encode("12.").ids, student.encode("12.").ids)
    found = Projection(vocabulary_map, stability, 20, 20).row(targets, pair)
    head, last = heads(found)
    by_text = {student.id_to_token(i): mass for i, mass in head.items()}
    # "13" may go on to be joined, which only "12" was seen to be; "7" alone is often joined, so it is not placed
    expected = {"12": 0.9 * 0.8 * 0.75, "123": 0.9 * 0.8 * 0.25, "13": 0.9 * 0.1, "1": 0.9 * 0.1, ".": 0.04}
    assert by_text.keys() == expected.keys()
    np.testing.assert_allclose([by_text[text] for text in expected], list(expected.values()), rtol=0.02)  # `share`
    np.testing.assert_allclose([by_text[text] for text in ("12", "1")], [0.54, 0.09], rtol=1e-5)
    np.testing.assert_allclose(np.exp(found.tail_logmass[0, 0]), 1 - sum(by_text.values()), atol=1e-6)
    np.testing.assert_allclose(found.label_logprobs, np.log([0.9 * 0.8, 0.75]), rtol=1e-5)
    assert by_text["12"] > 0 and last.keys() == {ids["."]} | {ids["3"]}


def test_digits_of_the_teacher_that_the_student_splits_add_up_and_have_no_head_within() -> None:
    teacher, student = digits(["12", "13", "123"]), digits([])
    vocabulary_map = vocabulary_map_of(teacher, student)
    targets = sparse({"123": 0.5, "12": 0.2, "1": 0.1, "7": 0.2}, {".": 1.0}, labels="123 .", teacher=teacher)
    pair = pair_of(vocabulary_map, teacher.encode("123.").ids, student.encode("123.").ids)
    found = Projection(vocabulary_map, never_joined(len(vocabulary_map.student)), 20, 20).row(targets, pair)
    assert found.counts.tolist() == [2, 0, 0, 1]
    np.testing.assert_allclose(list(heads(found)[0].values()), [0.8, 0.2], rtol=1e-5)
    np.testing.assert_allclose(found.label_logprobs, [np.log(0.5), 0, 0, 0], atol=1e-6)
    assert found.tail_logmass[1:3, 0].tolist() == [0.0, 0.0]


def test_a_permutation_of_ids_leaves_targets_as_they_are_bit_for_bit() -> None:
    teacher = student_tokenizer("three digits", 400)
    other = Tokenizer.from_str(permuted(teacher.to_str()))
    vocabulary_map = vocabulary_map_of(teacher, other)
    ids = vocabulary_map.other_ids(410)
    assert ids is not None and len(ids) == 410 and not np.array_equal(ids, np.arange(410))
    dense = cut(np.random.default_rng(1), 9, 400, np.array([0, 5, 3, 7, 1, 2, 6, 4, 5]), (1.0, 2.0), draws=6)
    there = renamed(dense.targets, ids)
    assert [teacher.id_to_token(i) for i in dense.targets.ids] == [other.id_to_token(i) for i in there.ids]
    back = np.argsort(ids).astype(np.int32)
    assert equal_targets(renamed(there, back), dense.targets)


def test_tokenizers_of_other_tokens_are_no_permutation() -> None:
    one, two = (student_tokenizer("three digits", 400, seed=seed) for seed in (0, 1))
    assert vocabulary_map_of(one, two).other_ids(400) is None
