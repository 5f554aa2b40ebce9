"""A row's text in the student's tokens: rendered anew where the cache knows the conversation, else piece by piece.

A job's plan keeps the conversation of each row and how it was rendered; it is rendered with the student's own chat
template, and a generated answer, as its tokens spell it, ends with the student's own end token where the teacher's
ended itself; a control token within it is the student's of the same name. Rows without a plan (merged or imported
caches, rows of `format: cache`) are cut at the teacher's control tokens: text between them is tokenized, and each of
them must be a control token of the student, but for the one that ends an answer. Cost: one tokenization per row.

Shape letters: T tokens of the row, n supervised spans.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.cache.rendering import source_of_job
from shared.errors import CacheError, PromptError
from shared.models.end_tokens import special_ids
from shared.parts.jobs import Job, PlanRow, list_jobs
from shared.parts.sequences import SequenceRow, make_row
from teacher_cache.prompts.templates.spans import Template
from teacher_cache.prompts.work_list import conversation_of
from tools.cache.translate.alignment import align
from tools.cache.translate.projection import RowPair
from tools.cache.translate.vocabulary_map import END, VocabularyMap


class UntranslatableError(Exception):
    """A row that is set aside; the message is the reason."""


_Planned = tuple[Job, PlanRow]
"""What a job knows of a row."""


class StudentRows:
    """Makes the rows of one cache anew."""

    def __init__(
        self,
        cache: Path,
        tokenizer: Any,
        vocabulary_map: VocabularyMap,
        other_ids: NDArray[np.int32] | None,
        chat_template: str | None,
    ) -> None:
        """Prepare to render rows.

        Args:
            cache: the teacher's.
            tokenizer: the student's, of transformers.
            vocabulary_map: between both vocabularies.
            other_ids: the student's id of each of the teacher's where both have the same tokens; answers are then taken
                token for token, as they were sampled.
            chat_template: Jinja text in place of the tokenizer's own.
        """
        self._tokenizer, self._map, self._other_ids = tokenizer, vocabulary_map, other_ids
        self._teacher, self._student = vocabulary_map.teacher, vocabulary_map.student
        self._cache, self._chat_template = cache, chat_template
        self._jobs = {job.id8: job for job in list_jobs(cache)}
        self._special = special_ids(tokenizer)
        self._templates: dict[tuple[str, int], Template] = {}

    def planned(self, stem: str) -> Mapping[bytes, _Planned]:
        """Return what the job of a sequences part knows of its rows, by row_key; nothing where it has no plan."""
        _, id8, unit = stem.split("-")
        job = self._jobs.get(id8)
        if job is None or int(unit) >= job.num_units:
            return {}
        return {row.row_key: (job, row) for row in job.unit(int(unit))}

    def row(self, row: SequenceRow, planned: _Planned | None) -> SequenceRow:
        """Return a row in the student's tokens.

        Raises:
            UntranslatableError: it cannot be rendered; with the reason.
            CacheError: the student has no template that can be used at all.
        """
        is_text = planned is not None and '"sequence"' not in planned[1].messages[:20]
        tokens, spans = self._rendered(row, planned) if planned is not None and is_text else self._by_pieces(row)
        kept = {n: getattr(row, n) for n in ("row_key", "group_key", "source", "prompt", "response", "reference")}
        try:
            return make_row(**kept, token_ids=tokens, spans=spans, finish_reason=row.finish_reason)
        except ValueError as error:
            raise UntranslatableError(str(error)) from None

    def pair(self, row: SequenceRow, translated: SequenceRow) -> RowPair:
        """Return the supervised tokens of both and where they begin together.

        Raises:
            UntranslatableError: their supervised spans are not of the same answers.
        """
        if len(row.spans) != len(translated.spans):
            raise UntranslatableError(
                f"{len(row.spans)} answers are supervised where the student's template gives {len(translated.spans)}"
            )
        spans, ends, first, teacher_first = [], (-1, -1), 0, 0
        for (start, end), (begin, stop) in zip(row.spans.tolist(), translated.spans.tolist(), strict=True):
            theirs, ours = row.token_ids[start:end].tolist(), translated.token_ids[begin:stop].tolist()
            told, said = [*map(self._map.teacher_bytes, theirs)], [*map(self._map.student_bytes, ours)]
            if theirs[-1] in self._teacher.special and ours[-1] in self._student.special:
                told[-1] = said[-1] = END
                ends = (theirs[-1], ours[-1])
            spans.append((teacher_first, teacher_first + len(theirs), first, align(told, said)))
            teacher_first, first = teacher_first + len(theirs), first + len(ours)
        return RowPair(row.labels(), translated.labels(), spans, ends)

    def _rendered(self, row: SequenceRow, planned: _Planned) -> tuple[Any, Any]:
        """Render the conversation with the student's template."""
        job, plan_row = planned
        conversation = conversation_of(plan_row)
        template = self._template(job, conversation.origin)
        try:
            if job.request.get("generate") is None:
                return template.complete(conversation)
            prompt = template.prompt_ids(conversation)
        except PromptError as error:
            raise UntranslatableError(" ".join(str(error).split())) from None
        start, stop = row.spans[-1].tolist()
        answer = row.token_ids[start:stop].tolist()
        ends = answer[-1] in self._teacher.special and row.finish_reason != "length"
        ids = [*self._answer_ids(answer[: len(answer) - ends]), *([template.end_token_id] if ends else [])]
        return [*prompt, *ids], [(len(prompt), len(prompt) + len(ids))]

    def _template(self, job: Job, origin: int) -> Template:
        """Return how a source's conversations are rendered; the teacher's own template is left behind."""
        key = (job.id, origin)
        if key not in self._templates:
            source = source_of_job(job, origin, self._cache)
            if source.format != "text" and source.template == "chat":
                source = source.model_copy(update={"chat_template": self._chat_template})
            try:
                self._templates[key] = Template(self._tokenizer, source, advise=False)
            except PromptError as error:
                raise CacheError(
                    f"{error}; for `decant cache translate` name a template with --chat-template"
                ) from None
        return self._templates[key]

    def _answer_ids(self, teacher_ids: list[int]) -> list[int]:
        """Tokenize what the teacher said: text, and control tokens within it as those of the same name.

        Raises:
            UntranslatableError: the student lacks one, or the text spells one of its own.
        """
        if self._other_ids is not None:
            return self._text_ids(teacher_ids)
        ids: list[int] = []
        for is_control, group in itertools.groupby(teacher_ids, self._teacher.special.__contains__):
            run = list(group)
            ids += map(self._control, run) if is_control else self._text_ids(run)
        return ids

    def _text_ids(self, teacher_ids: list[int]) -> list[int]:
        """Tokenize the text that teacher tokens spell; nothing is added.

        Raises:
            UntranslatableError: it spells a control token of the student.
        """
        if self._other_ids is not None:
            return list(self._other_ids[teacher_ids].tolist())
        octets = b"".join(map(self._map.teacher_bytes, teacher_ids))
        text = octets.decode(errors="replace")
        spelled = next((control for control in self._controls if control in text), None)
        if spelled is not None:
            raise UntranslatableError(f"the text contains {spelled!r}, which is a control token of the student")
        is_utf8 = text.encode() == octets
        ids = None if is_utf8 else self._map.student_ids(octets)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if ids is None else ids

    @cached_property
    def _controls(self) -> list[str]:
        return [str(self._tokenizer.convert_ids_to_tokens(i)) for i in sorted(self._special)]

    def _by_pieces(self, row: SequenceRow) -> tuple[Any, Any]:
        """Tokenize the text between control tokens, and between supervised and other tokens."""
        supervised = np.zeros(len(row.token_ids), np.bool_)
        supervised[row.supervised_index()] = True
        last = {int(end) - 1 for end in row.spans[:, 1]}
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for start, stop, is_control in self._pieces(row, supervised):
            begin = len(ids)
            if is_control:
                ids.append(self._control(int(row.token_ids[start]), ends=start in last))
            else:
                ids += self._text_ids(row.token_ids[start:stop].tolist())
            if supervised[start]:
                joins = bool(spans) and spans[-1][1] == begin and start not in row.spans[:, 0]
                spans[-1:] = [(spans[-1][0], len(ids))] if joins else [*spans[-1:], (begin, len(ids))]
        return ids, spans

    def _pieces(self, row: SequenceRow, supervised: np.ndarray) -> Iterator[tuple[int, int, bool]]:
        """Yield start, end and whether it is a control token, of runs of one kind."""
        control = np.isin(row.token_ids, list(self._teacher.special))
        breaks = control[1:] | control[:-1] | (supervised[1:] != supervised[:-1])
        breaks[row.spans[:, 0] - 1] = True
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(row.token_ids)]
        for start, stop in itertools.pairwise(edges):
            yield start, stop, bool(control[start])

    def _control(self, token: int, *, ends: bool = False) -> int:
        """Return the student's control token for one of the teacher's."""
        if ends and self._tokenizer.eos_token_id is not None:
            return int(self._tokenizer.eos_token_id)
        found = int(self._map.ids[token])
        if found < 0:
            raise UntranslatableError(f"the student has no control token {self._teacher.pieces[token]!r}")
        return found
