"""Plan rows become sequences rows: tokens, spans, texts and keys, or the reason why they cannot be one.

Every reason that would keep a row from being scored is found here, before sequences are committed: too long, ids
outside the vocabulary, an empty answer, a template that cannot be split.

Cost: prompts are tokenized in batches, which the tokenizer does outside the interpreter's lock and on all cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import PromptError
from shared.parts.jobs import PlanRow
from shared.parts.sequences import SequenceRow, make_row
from shared.recipe.recipe import PromptSource
from shared.schema import MAX_TOKENS_PER_ROW
from teacher_cache.prompts.templates.spans import Template, Templates
from teacher_cache.prompts.work_list import conversation_of

TOKENIZED_AT_ONCE = 64
"""Prompts of one batch: enough for the cost of a call to vanish, few enough that its bookkeeping of long prompts stays
small.
"""


class UnusableRowError(Exception):
    """A row that is set aside; the message is the reason, without the place."""


def prompt_too_long(num_tokens: int, longest: int) -> str | None:
    """Say why a prompt of so many tokens leaves no room for an answer in rows of `longest` tokens; None where it
    does.
    """
    room = f"no room for an answer within max_model_len = {longest:,}"
    return f"the prompt has {num_tokens:,} tokens, which leaves {room}" if num_tokens > longest - 1 else None


def row_too_long(num_tokens: int, longest: int) -> str | None:
    """Say why prompt and answer of so many tokens are no row of `longest` tokens; None where they are."""
    too_long = num_tokens > longest
    return f"prompt and answer have {num_tokens:,} tokens and max_model_len is {longest:,}" if too_long else None


class SequenceMaker:
    """Makes the sequences rows of one build."""

    def __init__(self, tokenizer: Any, sources: Sequence[PromptSource], vocab_size: int, max_model_len: int) -> None:
        """Check every source's template.

        Raises:
            PromptError: a template that cannot be used at all.
        """
        self._tokenizer = tokenizer
        self.templates = Templates(Template(tokenizer, source) for source in sources)
        self._vocab_size = vocab_size
        self._max_model_len = min(max_model_len, MAX_TOKENS_PER_ROW)

    def end_token_ids(self, row: PlanRow) -> tuple[int, ...]:
        """Return the token that ends an answer to this row in its source's template."""
        return (self.templates[conversation_of(row).origin].end_token_id,)

    def prompts(self, rows: Sequence[PlanRow]) -> Iterator[list[int] | UnusableRowError]:
        """Yield for each row the tokens after which an answer is asked for.

        Where a row cannot be rendered or leaves no room for an answer, the reason is yielded instead.
        """
        for start in range(0, len(rows), TOKENIZED_AT_ONCE):
            yield from self._prompts_at_once(rows[start : start + TOKENIZED_AT_ONCE])

    def _prompts_at_once(self, rows: Sequence[PlanRow]) -> list[list[int] | UnusableRowError]:
        rendered: list[tuple[list[int], str] | UnusableRowError] = []
        for row in rows:
            conversation = conversation_of(row)
            try:
                rendered.append(self.templates[conversation.origin].prompt_text(conversation))
            except PromptError as error:
                rendered.append(UnusableRowError(str(error).removeprefix(f"{conversation.place}: ")))
        texts = [one[1] for one in rendered if not isinstance(one, UnusableRowError)]
        tokenized = iter(self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
        return [
            one if isinstance(one, UnusableRowError) else self._checked_prompt(one[0] + next(tokenized))
            for one in rendered
        ]

    def _checked_prompt(self, ids: list[int]) -> list[int] | UnusableRowError:
        too_long = prompt_too_long(len(ids), self._max_model_len)
        if too_long is not None:
            return UnusableRowError(too_long)
        highest = max(ids, default=0)
        return ids if highest < self._vocab_size else UnusableRowError(self._outside(highest))

    def given(self, row: PlanRow) -> SequenceRow:
        """Return the row of an answer that came with the data.

        Raises:
            UnusableRowError: it cannot be split or scored.
        """
        conversation = conversation_of(row)
        try:
            token_ids, spans = self.templates[conversation.origin].complete(conversation)
        except PromptError as error:
            raise UnusableRowError(str(error).removeprefix(f"{conversation.place}: ")) from error
        if conversation.sequence is not None:
            return self._row(row, token_ids, spans, conversation.sequence.response, conversation.sequence.finish_reason)
        template = self.templates[conversation.origin]
        answer = conversation.messages[-1] if conversation.messages else None
        said = {} if answer is None else answer.keys() - {"role"}
        response = (
            ""
            if answer is None
            else answer["content"]
            if said == {"content"}
            else template.answer_text(token_ids, spans)
        )
        return self._row(row, token_ids, spans, response, "given")

    def answered(
        self,
        row: PlanRow,
        prompt_ids: list[int],
        answer_ids: list[int],
        finish_reason: str,
        *,
        cut_at_stop: bool = False,
    ) -> SequenceRow:
        """Return the row of an answer that an engine generated; one that was cut at a stop text gets no end token.

        Raises:
            UnusableRowError: the answer is empty or cannot be scored.
        """
        template = self.templates[conversation_of(row).origin]
        try:
            token_ids, spans = template.with_answer(prompt_ids, answer_ids, "length" if cut_at_stop else finish_reason)
        except ValueError as error:
            raise UnusableRowError(f"{error}{' before its stop text' if cut_at_stop else ''}") from error
        self._require_vocabulary(token_ids)
        return self._row(row, token_ids, spans, template.answer_text(token_ids, spans), finish_reason)

    def _row(
        self, row: PlanRow, token_ids: NDArray[np.int32], spans: NDArray[np.int32], response: str, finish_reason: str
    ) -> SequenceRow:
        too_long = row_too_long(len(token_ids), self._max_model_len)
        if too_long is not None:
            raise UnusableRowError(too_long)
        self._require_vocabulary(token_ids)
        return make_row(
            row_key=row.row_key,
            group_key=row.group_key,
            source=row.source,
            prompt=row.prompt,
            response=response,
            reference=row.reference,
            token_ids=token_ids,
            spans=spans,
            finish_reason=finish_reason,
        )

    def _require_vocabulary(self, token_ids: NDArray[Any]) -> None:
        if len(token_ids) and int(token_ids.max()) >= self._vocab_size:
            raise UnusableRowError(self._outside(int(token_ids.max())))

    def _outside(self, token_id: int) -> str:
        return f"token id {token_id} lies outside the vocabulary of {self._vocab_size:,} entries"
