"""A teacher with the id statistics of real text: an interpolated trigram model over real tokens.

Where the synthetic teacher's ids are the worst case for a codec, these repeat as those of text do: the best case. Its
data (public question-answering texts and a vocabulary of 151,936 entries) lies beside the checkout at `../shared/data`;
where it is absent, so is this teacher. p = lambda_3 trigram + (1 - lambda_3) (lambda_2 bigram + (1 - lambda_2)
unigram), each lambda after Witten and Bell (1991) with a factor of 1.5. Cost: ten seconds to count, then a millisecond
per position over the 20,000 tokens that occur.

Shape letters: S positions of a row, W words that occur in the texts.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.payload.targets import Draws, SparseTargets

VOCAB_SIZE = 151_936
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
_WITTEN_BELL = 1.5


def has_data() -> bool:
    """Tell whether texts and vocabulary are there, and a library that reads it."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        return False
    return all(
        (DATA / name).exists() for name in ("qwen_tokenizer/vocab.json", "gsm8k/train.jsonl", "pubmedqa/ori_pqal.json")
    )


def read_token_rows(seed: int = 0) -> list[list[int]]:
    """Return the texts as token ids, shuffled."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    texts = []
    with (DATA / "gsm8k/train.jsonl").open(encoding="utf-8") as lines:
        texts += [f"{row['question']}\n{row['answer']}" for row in map(json.loads, lines)]
    articles = json.loads((DATA / "pubmedqa/ori_pqal.json").read_text(encoding="utf-8"))
    texts += [f"{a['QUESTION']} {' '.join(a['CONTEXTS'])} {a['LONG_ANSWER']}" for a in articles.values()]
    random.Random(seed).shuffle(texts)
    vocabulary = DATA / "qwen_tokenizer"
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


class TrigramTeacher:
    """Counts of token rows, and next-token distributions from them."""

    def __init__(self, rows: list[list[int]], also: list[list[int]]) -> None:
        """Count `rows`; tokens that only occur in `also` get half a count, so that no label is impossible."""
        unigrams: Counter[int] = Counter()
        self._bigrams: dict[int, Counter[int]] = defaultdict(Counter)
        self._trigrams: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
        for row in rows:
            unigrams.update(row)
            for a, b in pairwise(row):
                self._bigrams[a][b] += 1
            for a, b, c in zip(row, row[1:], row[2:], strict=False):
                self._trigrams[a, b][c] += 1
        self.words = np.array(sorted({*unigrams, *(token for row in also for token in row)}), np.int32)
        self._column = {int(word): i for i, word in enumerate(self.words)}
        counts = np.array([unigrams.get(int(word), 0.5) for word in self.words])
        self._unigram = counts / counts.sum()

    def column(self, token: int) -> int:
        """Return the index of a token in `words`."""
        return self._column[token]

    def probabilities(self, before: int, last: int) -> NDArray[np.float64]:
        """Return [W] probabilities of the next token after two tokens."""
        p = self._unigram
        for followers in (self._bigrams.get(last), self._trigrams.get((before, last))):
            if followers:
                total = followers.total()
                weight = total / (total + _WITTEN_BELL * len(followers))
                p = (1 - weight) * p
                p[[self._column[token] for token in followers]] += weight * np.array(list(followers.values())) / total
        normalised: NDArray[np.float64] = p / p.sum()
        return normalised


def targets_of_row(
    teacher: TrigramTeacher, row: list[int], k: int, draws: int, rng: np.random.Generator, mass: float = 1.0
) -> SparseTargets:
    """Return targets for every token of a row but the first two.

    Args:
        teacher: where the probabilities come from.
        row: token ids.
        k: most head entries per position.
        draws: tokens drawn from the tail per position.
        rng: decides the draws.
        mass: stop before k once this much probability is covered.
    """
    ids, logprobs, counts, labels, tails = [], [], [], [], []
    drawn: list[NDArray[np.int64]] = []
    for before, last, label in zip(row, row[1:], row[2:], strict=False):
        p = teacher.probabilities(before, last)
        head = np.argpartition(-p, k)[:k]
        head = head[np.argsort(-p[head], kind="stable")]
        covered = np.cumsum(p[head])
        head = head[: int((covered < mass).sum()) + 1]
        rest = p.copy()
        rest[head] = 0.0
        counts.append(len(head))
        ids.append(teacher.words[head])
        logprobs.append(np.log(p[head]))
        labels.append(np.log(p[teacher.column(label)]))
        tails.append(np.log(rest.sum()))
        if draws:
            cumulated = np.cumsum(rest)
            drawn.append(np.searchsorted(cumulated, rng.random(draws) * cumulated[-1]))
    return SparseTargets(
        np.array(counts, np.int32),
        np.concatenate(ids).astype(np.int32),
        np.concatenate(logprobs).astype(np.float32),
        np.array(labels, np.float32),
        np.array(tails, np.float32)[:, None],
        draws=(_counted(teacher, drawn),) if draws else (),
    )


def _counted(teacher: TrigramTeacher, drawn: list[NDArray[np.int64]]) -> Draws:
    """Return distinct drawn tokens with their multiplicities."""
    pairs = [np.unique(columns, return_counts=True) for columns in drawn]
    return Draws(
        np.array([len(columns) for columns, _ in pairs], np.int32),
        teacher.words[np.concatenate([columns for columns, _ in pairs])].astype(np.int32),
        np.concatenate([multiplicities for _, multiplicities in pairs]).astype(np.int32),
    )


def make_teacher(test_rows: int = 40, seed: int = 0) -> tuple[TrigramTeacher, list[list[int]]]:
    """Return a teacher counted on all texts but `test_rows`, and those."""
    rows = read_token_rows(seed)
    return TrigramTeacher(rows[test_rows:], rows[:test_rows]), rows[:test_rows]
