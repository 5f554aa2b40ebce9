"""Every position of an odd text is aligned where the bytes say so, or counted as not aligned: as brute force says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from shared.tokens.token_bytes import read_vocabulary
from tests.tools.translate.odd_texts import odd_text
from tests.tools.translate.student_tokenizers import KINDS, student_tokenizer
from tools.cache.translate.alignment import align
from tools.cache.translate.vocabulary_map import UNKNOWN

QWEN = Path(__file__).resolve().parents[4] / "shared" / "data" / "qwen_tokenizer"
TEXTS = 1000


@pytest.fixture(scope="module")
def encoders() -> list:
    """Functions from a text to the bytes of its tokens, one for each of many random tokenizers."""
    sizes = {"joined digits": (300, 450, 700), "unigram": (200, 350)}
    made = [student_tokenizer(kind, size, seed=size) for kind in KINDS for size in sizes.get(kind, (400, 600))]
    return [encoder(tokenizer) for tokenizer in made]


def encoder(tokenizer: Tokenizer):
    vocabulary = read_vocabulary(tokenizer.to_str().encode())

    def encode(text: str) -> list[bytes]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return [vocabulary.octets[i] or UNKNOWN for i in ids]

    return encode


def check(teacher: list[bytes], student: list[bytes]) -> tuple[int, int]:
    """Compare with brute force; return positions and how many lie in chunks of equal bytes."""
    found = align(teacher, student)
    ours, theirs = b"".join(student), b"".join(teacher)
    ours, theirs = ours[found.student_lead :], theirs[found.teacher_lead :]
    ends_of = {
        side: [0, *(max(len(b"".join(t[: i + 1])) - lead, 0) for i in range(len(t)))]
        for side, t, lead in (("teacher", teacher, found.teacher_lead), ("student", student, found.student_lead))
    }
    cuts = list(zip(found.teacher.tolist(), found.student.tolist(), strict=True))
    for t, s in cuts:
        before = theirs[: ends_of["teacher"][t]], ours[: ends_of["student"][s]]
        after = theirs[ends_of["teacher"][t] :], ours[ends_of["student"][s] :]
        assert before[0] == before[1] or after[0] == after[1]
    if ours == theirs:
        common = sorted(set(ends_of["teacher"][:-1]) & set(ends_of["student"][:-1]) - {len(ours)})
        assert [ends_of["student"][s] for _, s in cuts] == common
        assert found.is_whole.all()
    covered = 0
    for (t, s), t_end, s_end, whole in zip(cuts, found.teacher_ends, found.student_ends, found.is_whole, strict=True):
        if whole:
            covered += int(s_end) - s
            told = b"".join(teacher[t : int(t_end)]), b"".join(student[s : int(s_end)])
            assert told[0][found.teacher_lead if t == 0 else 0 :] == told[1][found.student_lead if s == 0 else 0 :]
    return len(student), covered


def test_alignment_of_a_thousand_odd_texts_is_that_of_brute_force(encoders) -> None:
    rng, positions, covered = random.Random(0), 0, 0
    for seed in range(TEXTS):
        text = odd_text(seed)
        teacher, student = (encode(text) for encode in rng.sample(encoders, 2))
        if not teacher or not student:
            continue
        if rng.random() < 0.2:  # a lone byte, or another one on one side
            teacher = [*teacher, b"\xf0\x9f"]
            student = [*student, b"\xf0", rng.choice([b"\x9f", b"\x9e"])]
        total, whole = check(teacher, student)
        positions, covered = positions + total, covered + whole
    assert covered > 0.8 * positions


@pytest.mark.slow
@pytest.mark.skipif(not QWEN.is_dir(), reason=f"{QWEN} is absent")
def test_alignment_against_the_vocabulary_of_qwen(encoders) -> None:
    from tokenizers import decoders, models, pre_tokenizers

    qwen = Tokenizer(models.BPE.from_file(str(QWEN / "vocab.json"), str(QWEN / "merges.txt")))
    qwen.pre_tokenizer, qwen.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    encode = encoder(qwen)
    assert all(b"".join(encode(odd_text(seed))) == odd_text(seed).encode() for seed in range(100))
    totals = [check(encode(odd_text(seed)), encoders[seed % len(encoders)](odd_text(seed))) for seed in range(300)]
    assert sum(whole for _, whole in totals) > 0.8 * sum(total for total, _ in totals)


def test_changed_text_is_aligned_before_and_after_it_alone() -> None:
    found = align([b"a", b"B", b"c", b"d"], [b"a", b"b", b"cd"])
    assert list(zip(found.teacher, found.student, found.is_whole, strict=True)) == [
        (0, 0, True),
        (1, 1, False),
        (2, 2, True),
    ]
