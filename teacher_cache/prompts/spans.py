"""What is supervised: a conversation becomes token ids and spans.

Spans come from rendering prefixes: for each assistant turn, the conversation before it with the generation prompt (A)
and the conversation up to and with it (B). On tokens, A must be a prefix of B, and B up to its end token a prefix of
the next A. Where one is not (a template that rewrites earlier turns, a token that spans the seam), no span would be
what the model sees, and the row is refused with its place. Template text after the last end token (a newline, say) is
dropped; the end token itself is supervised. Plain text (`template: none`, `format: text`) starts with BOS where the
tokenizer starts plain text so.

Cost: two renderings and tokenizations per assistant turn.

Shape letters: T tokens of the row, n supervised spans.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import PromptError
from shared.models.end_tokens import special_ids
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.chat_template import ChatTemplate
from teacher_cache.prompts.prompt_formats import Conversation, Message, prompt_turns

Tokens = tuple[NDArray[np.int32], NDArray[np.int32]]
"""token ids [T] and spans [n, 2], start and end (exclusive)"""

NO_ANSWER = "the row has no answer; give one or add a `generate` section to the recipe"


class Template:
    """How one prompt source's conversations become tokens."""

    def __init__(self, tokenizer: Any, source: PromptSource) -> None:
        """Read the template and derive its end token.

        Raises:
            PromptError: the tokenizer has no template, it cannot render, or it ends no answer with a token.
        """
        self._tokenizer = tokenizer
        self._system = source.system
        self._special = special_ids(tokenizer)
        self._chat: ChatTemplate | None = None
        if source.format == "cache":
            self.end_token_id = -1  # nothing is rendered
        elif source.format == "text" or source.template == "none":
            if tokenizer.eos_token_id is None:
                raise PromptError(
                    f"source {source.source!r}: the tokenizer has no eos token to end an answer with; use a chat "
                    "template"
                )
            self.end_token_id = int(tokenizer.eos_token_id)
        else:
            self._chat = ChatTemplate(tokenizer, source)
            self.end_token_id = self._chat.end_token_id

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Return the tokens after which an answer is asked for: up to the last user turn, with the generation prompt.

        Raises:
            PromptError: with path:line, when the template cannot render the conversation.
        """
        first_ids, text = self.prompt_text(conversation)
        return first_ids + self._ids(text)

    def prompt_text(self, conversation: Conversation) -> tuple[list[int], str]:
        """Return what `prompt_ids` consists of: the ids that come first, and the text to tokenize after them.

        Raises:
            PromptError: with path:line, when the template cannot render the conversation.
        """
        turns = self._with_system(_turns(conversation))
        if self._chat is None:
            return self._bos, _plain_prompt(turns, conversation.place)
        self._chat.refuse_special_text(turns, conversation.place)
        return [], self._chat.text(turns, conversation.place, prompt=True)

    def complete(self, conversation: Conversation) -> Tokens:
        """Return token ids [T] and spans [n, 2] of a conversation whose answers are given.

        Raises:
            PromptError: with path:line, when there is no answer or the template cannot be split.
        """
        if conversation.sequence is not None:
            return _tokens(
                conversation.sequence.token_ids, [(start, end) for start, end in conversation.sequence.spans]
            )
        if conversation.text is not None:
            ids = self._bos + self._ids(conversation.text)
            if len(ids) < 2:
                raise PromptError(
                    f"{conversation.place}: the text has fewer than two tokens, so there is nothing to predict"
                )
            return _tokens(ids, [(1, len(ids))])
        if self._chat is None:
            return self._complete_plain(conversation)
        assert conversation.messages is not None
        messages = self._with_system(conversation.messages)
        last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            raise PromptError(f"{conversation.place}: {NO_ANSWER}")
        self._chat.refuse_special_text(messages, conversation.place)
        done: list[int] = []
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages[: last + 1]):
            if message["role"] == "assistant":
                done, span = self._split_turn(self._chat, messages[: index + 1], done, conversation.place)
                spans.append(span)
        return _tokens(done, spans)

    def with_answer(self, prompt_ids: list[int], answer_ids: list[int], finish_reason: str) -> Tokens:
        """Return token ids [T] and the answer's span [1, 2] for a generated answer.

        An answer that stopped ends with the template's end token: another special token that the model stopped with is
        replaced by it, a missing one added. An answer cut by length has none.

        Raises:
            ValueError: the answer is empty.
        """
        answer = list(answer_ids)
        if finish_reason == "stop" and (not answer or answer[-1] != self.end_token_id):
            if answer and answer[-1] in self._special:
                answer.pop()
            answer.append(self.end_token_id)
        if answer in ([], [self.end_token_id]):
            raise ValueError("the answer is empty")
        return _tokens([*prompt_ids, *answer], [(len(prompt_ids), len(prompt_ids) + len(answer))])

    def answer_text(self, token_ids: NDArray[np.int32], spans: NDArray[np.int32]) -> str:
        """Return the text of the last supervised span, special tokens left out."""
        start, end = spans[-1]
        return str(self._tokenizer.decode(token_ids[start:end].tolist(), skip_special_tokens=True))

    def _split_turn(
        self, chat: ChatTemplate, turns: list[Message], done: list[int], place: str
    ) -> tuple[list[int], tuple[int, int]]:
        """Return the ids up to the last turn's end token and that turn's span; `done` is the same ids of the answer
        before.
        """
        before = chat.ids(turns[:-1], place, prompt=True)
        whole = chat.ids(turns, place, prompt=False)
        ends = [index for index in range(len(before), len(whole)) if whole[index] == self.end_token_id]
        wrong = None
        if before[: len(done)] != done:
            wrong = "rewrites an earlier answer once later turns follow"
        elif whole[: len(before)] != before:
            wrong = "does not start the answer where its generation prompt ends"
        elif len(ends) != 1 or self._tokenizer.decode(whole[ends[0] + 1 :]).strip():
            wrong = "does not end the answer with exactly one end token"
        elif ends[0] == len(before):
            wrong = "drops the answer's text"
        if wrong is not None:
            raise PromptError(
                f"{place}: turn {len(turns)} cannot be split into prompt and answer because {chat.origin} {wrong}; "
                "change `chat_template` or `chat_template_kwargs`, or give one row per answer"
            )
        return whole[: ends[0] + 1], (len(before), ends[0] + 1)

    def _complete_plain(self, conversation: Conversation) -> Tokens:
        turns, place = _turns(conversation), conversation.place
        assert conversation.messages is not None
        rest = conversation.messages[len(turns) :]
        if len(rest) != 1:
            raise PromptError(
                f"{place}: {NO_ANSWER}"
                if not rest
                else f"{place}: `template: none` takes one answer, found {len(rest)}"
            )
        prompt = _plain_prompt(self._with_system(turns), place)
        bos, before, whole = self._bos, self._ids(prompt), self._ids(prompt + rest[0]["content"])
        if whole[: len(before)] != before or len(whole) == len(before):
            raise PromptError(
                f"{place}: a token spans the seam of prompt and answer; move white space there to the answer's start"
            )
        start = len(bos) + len(before)
        ids = [*bos, *whole, self.end_token_id]
        return _tokens(ids, [(start, len(ids))])

    def _with_system(self, turns: list[Message]) -> list[Message]:
        """Put the source's system text first where the row has none of its own."""
        if self._system is None or turns[0]["role"] == "system":
            return turns
        return [{"role": "system", "content": self._system}, *turns]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _bos(self) -> list[int]:
        """The BOS token as a list where the tokenizer starts plain text with one, else nothing."""
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and self._tokenizer("a")["input_ids"][:1] == [bos] else []


def _turns(conversation: Conversation) -> list[Message]:
    if conversation.messages is None:
        raise PromptError(
            f"{conversation.place}: `format: text` has no prompt to answer; leave `generate` out or change the format"
        )
    try:
        return prompt_turns(conversation.messages)
    except ValueError as error:
        raise PromptError(f"{conversation.place}: {error}") from error


def _plain_prompt(turns: list[Message], place: str) -> str:
    if [turn["role"] for turn in turns] not in (["user"], ["system", "user"]):
        raise PromptError(
            f"{place}: `template: none` takes one prompt, found the turns {', '.join(turn['role'] for turn in turns)}"
        )
    return "\n\n".join(turn["content"] for turn in turns)


def _tokens(ids: list[int], spans: list[tuple[int, int]]) -> Tokens:
    return np.asarray(ids, dtype=np.int32), np.asarray(spans, dtype=np.int32).reshape(-1, 2)
