"""What separates a model's sampled answers from the teacher's and from the student's before, at each temperature.

Answers are compared prompt by prompt: the share that is identical, length kept (characters of all answers over the
teacher's), terms kept (`terms`), structure kept (`structure`), and the share that switched language (`language`): it
uses one that neither the prompt nor the teacher's answer uses. A share of nothing (a teacher without lists, say) is
None. At low temperatures all answers may be identical where models differ: read them at every temperature. Cost:
regular expressions over the kept answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tools.evaluate.side_by_side.language import has_switched, languages_of
from tools.evaluate.side_by_side.structure import num_kept as structure_kept
from tools.evaluate.side_by_side.structure import structure_of
from tools.evaluate.side_by_side.terms import num_kept as terms_kept
from tools.evaluate.side_by_side.terms import terms_of

Answers = dict[str, dict[int, dict[str, Any]]]
"""temperature -> number of the prompt -> kept row"""


@dataclass(frozen=True, slots=True)
class Reference:
    """What the teacher's answers at one temperature hold, extracted once for all models."""

    texts: Sequence[str]
    terms: Sequence[set[str]]
    structures: Sequence[Counter[str]]
    languages: Sequence[frozenset[str]]
    """Of prompt and teacher's answer."""


def by_temperature(rows: Iterable[dict[str, Any]]) -> Answers:
    """Return the kept rows of a model's sampled answers by their temperature and prompt, the first of equals."""
    found: Answers = {}
    for row in rows:
        found.setdefault(f"{row['temperature']:g}", {}).setdefault(row["number"], row)
    return found


def side_by_side_figures(answers: Mapping[str, Answers]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return model -> temperature -> figures, over the prompts that every model with that temperature answered."""
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in answers}
    for temperature in dict.fromkeys(temperature for of in answers.values() for temperature in of):
        rows = {name: of[temperature] for name, of in answers.items() if temperature in of}
        shared = sorted(set.intersection(*(set(of) for of in rows.values())))
        same = [n for n in shared if len({of[n]["prompt"] for of in rows.values()}) == 1]
        if not same:
            continue
        ordered = {name: [of[number] for number in same] for name, of in rows.items()}
        reference = _reference(ordered["teacher"]) if "teacher" in ordered else None
        for name, own in ordered.items():
            found[name][temperature] = _figures(own, reference, ordered.get("teacher"), ordered.get("base"))
    return {name: figures for name, figures in found.items() if figures}


def _reference(teacher: Sequence[Mapping[str, Any]]) -> Reference:
    texts = [str(row["answer"]) for row in teacher]
    languages = [
        languages_of(str(row["prompt"])) | languages_of(text) for row, text in zip(teacher, texts, strict=True)
    ]
    return Reference(texts, terms_of(texts), [structure_of(text) for text in texts], languages)


def _figures(
    own: Sequence[Mapping[str, Any]],
    reference: Reference | None,
    teacher: Sequence[Mapping[str, Any]] | None,
    base: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    texts = [str(row["answer"]) for row in own]
    figures: dict[str, Any] = {
        "answers": len(own),
        "mean_tokens": sum(row.get("tokens") or 0 for row in own) / len(own),
        "truncated": sum(bool(row.get("truncated")) for row in own) / len(own),
        "same_as_teacher": _same(own, teacher),
        "same_as_base": _same(own, base),
        "length_kept": None,
        "terms_kept": None,
        "structure_kept": None,
    }
    if reference is None:
        expected = [languages_of(str(row["prompt"])) for row in own]
        return {
            **figures,
            "language_switched": fmean([has_switched(*pair) for pair in zip(texts, expected, strict=True)]),
        }
    num_terms, parts = sum(map(len, reference.terms)), sum(of.total() for of in reference.structures)
    kept = sum(terms_kept(terms, text) for terms, text in zip(reference.terms, texts, strict=True))
    kept_parts = sum(structure_kept(wanted, text) for wanted, text in zip(reference.structures, texts, strict=True))
    length = sum(map(len, reference.texts))
    return {
        **figures,
        "length_kept": sum(map(len, texts)) / length if length else None,
        "terms_kept": kept / num_terms if num_terms else None,
        "structure_kept": kept_parts / parts if parts else None,
        "language_switched": fmean([has_switched(*pair) for pair in zip(texts, reference.languages, strict=True)]),
        "teacher_terms": num_terms,
        "teacher_structure": parts,
    }


def _same(own: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]] | None) -> float | None:
    if other is None or other is own:
        return None
    return fmean([mine["answer"] == theirs["answer"] for mine, theirs in zip(own, other, strict=True)])
