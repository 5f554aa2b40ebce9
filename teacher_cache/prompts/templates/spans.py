"""What is supervised: a conversation becomes token ids and spans.

Spans come from rendering prefixes: for each answer that is trained, the conversation before it with the generation
prompt (A) and the conversation up to and with it (B). On tokens, A must be a prefix of B, and B up to its end token a
prefix of the next A. Where one is not (a template that rewrites earlier turns, a token that spans the seam), no span
would be what the model sees, and the row is refused with its place. So is a row of which the tokens lack a text
(kept_text.py). White space and special tokens after an answer's end token are dropped; the end token itself is
supervised. Answers that are not trained (a mark of the row, or `supervise: last`) are context, which a template may
render as it likes. Plain text (`template: none`, `format: text`) starts with BOS where the tokenizer starts plain text
so.

Cost: two renderings per trained answer, of the turns up to it. Each text is tokenized twice, since an answer's end
token is a place to go on from, and once more as a whole, to compare.

Shape letters: T tokens of the row, n supervised spans.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import PromptError
from shared.models.end_tokens import special_ids
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.formats.prompt_formats import NO_ANSWER, Conversation, prompt_turns
from teacher_cache.prompts.formats.prompt_turns import Message
from teacher_cache.prompts.templates.chat_template import ChatTemplate, UnrenderableError
from teacher_cache.prompts.templates.kept_text import missing_of_answer, missing_of_prompt
from teacher_cache.prompts.templates.way_out import way_out

Tokens = tuple[NDArray[np.int32], NDArray[np.int32]]
"""token ids [T] and spans [n, 2], start and end (exclusive)"""


@dataclass(frozen=True, slots=True)
class _Done:
    """A conversation up to and with the end token of an answer."""

    ids: list[int]
    text: str | None
    """Its rendering without the end token; None where the next piece cannot be tokenized alone."""


ROWS_ADVISED = 20
"""Rows of one template for which advice is looked for; later rows get the last that was found for their kind of
problem.
"""


class Template:
    """How one prompt source's conversations become tokens."""

    def __init__(self, tokenizer: Any, source: PromptSource, *, advise: bool = True) -> None:
        """Read the template and derive its end token.

        Args:
            tokenizer: as transformers loads it.
            source: settings of the rows.
            advise: look for what to do about a row that cannot be rendered.

        Raises:
            PromptError: the tokenizer has no template, it cannot render, or it ends no answer with a token.
        """
        self._tokenizer = tokenizer
        self._source = source
        self._advise = advise
        self._advice: dict[str, str] = {}
        self._rows_advised = 0
        self._special = special_ids(tokenizer)
        self._chat: ChatTemplate | None = None
        if source.of_cache:
            self.end_token_id = -1  # nothing is rendered
        elif source.of_text or source.template == "none":
            if tokenizer.eos_token_id is None:
                raise PromptError(
                    f"source {source.source!r}: the tokenizer has no eos token to end an answer with; use a chat "
                    "template"
                )
            self.end_token_id = int(tokenizer.eos_token_id)
        else:
            self._chat = ChatTemplate(tokenizer, source)
            self.end_token_id = self._chat.end_token_id

    @property
    def unread_settings(self) -> list[str]:
        """Return a sentence for each setting of the source that its chat template does not read."""
        return [] if self._chat is None else self._chat.unread_settings

    def require_date(self) -> None:
        """Refuse a template that reads the clock where the recipe names no date; before any work, as far as a probe
        shows it.

        Raises:
            PromptError: with the setting.
        """
        if self._chat is not None and self._chat.reads_clock and self._source.date is None:
            raise PromptError(f"source {self._source.source!r}: {self._chat.clock_problem}")

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
        try:
            text = self._chat.text(turns, conversation.place, prompt=True)
            self._require_prompt(turns, text, conversation.place)
        except UnrenderableError as error:
            raise self._with_advice(error, conversation, lambda template, row: template.prompt_text(row)) from error
        return [], text

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
        try:
            return self._complete_chat(self._chat, conversation)
        except UnrenderableError as error:
            raise self._with_advice(error, conversation, lambda template, row: template.complete(row)) from error

    def _complete_chat(self, chat: ChatTemplate, conversation: Conversation) -> Tokens:
        assert conversation.messages is not None
        messages, place = self._with_system(conversation.messages), conversation.place
        trained = trained_answers(messages, place)[-1 if self._source.supervise == "last" else 0 :]
        chat.refuse_special_text(messages, place)
        for piecewise in (True, False):
            done, spans, text = _Done([], "" if piecewise else None), list[tuple[int, int]](), ""
            for index in trained:
                done, span, text = self._split_turn(chat, messages[: index + 1], done, place)
                spans.append(span)
            if not piecewise or len(trained) == 1 or self._holds(chat, messages[: trained[-1] + 1], done, place):
                break
        self._require_prompt(messages[: trained[-1]], text, place)
        return _tokens(done.ids, spans)

    def _holds(self, chat: ChatTemplate, turns: list[Message], done: _Done, place: str) -> bool:
        """Tell whether ids that were joined from pieces are those of the whole."""
        return chat.ids(turns, place, prompt=False)[: len(done.ids)] == done.ids

    def with_answer(self, prompt_ids: list[int], answer_ids: list[int], finish_reason: str) -> Tokens:
        """Return token ids [T] and the answer's span [1, 2] for a generated answer.

        An answer that stopped ends with the template's end token, or with one that it writes at other ends, such as
        that of a tool call: another special token that the model stopped with is replaced by the end token, a missing
        one added. An answer cut by length has none.

        Raises:
            ValueError: the answer is empty.
        """
        answer = list(answer_ids)
        if finish_reason == "stop" and (not answer or answer[-1] not in self._own_ends):
            if answer and answer[-1] in self._special:
                answer.pop()
            answer.append(self.end_token_id)
        if not answer or (len(answer) == 1 and answer[0] in self._own_ends):
            raise ValueError("the generated answer is empty")
        return _tokens([*prompt_ids, *answer], [(len(prompt_ids), len(prompt_ids) + len(answer))])

    @property
    def _own_ends(self) -> frozenset[int]:
        others = frozenset[int]() if self._chat is None else self._chat.other_end_ids
        return others | {self.end_token_id}

    def answer_text(self, token_ids: NDArray[np.int32], spans: NDArray[np.int32]) -> str:
        """Return the text of the last supervised span, special tokens left out."""
        start, end = spans[-1]
        return str(self._tokenizer.decode(token_ids[start:end].tolist(), skip_special_tokens=True))

    def _split_turn(
        self, chat: ChatTemplate, turns: list[Message], done: _Done, place: str
    ) -> tuple[_Done, tuple[int, int], str]:
        """Split at the last turn.

        Args:
            chat: the template.
            turns: up to and with the answer.
            done: what ends with the trained answer before.
            place: for errors.

        Returns:
            what ends with this answer, its span, and the text before it.
        """
        text, whole_text = chat.text(turns[:-1], place, prompt=True), chat.text(turns, place, prompt=False)
        before, whole = self._ids_after(done, text), self._ids_after(done, whole_text)
        end = self._end_of(whole, len(before), turns[-1])
        wrong = None
        if before[: len(done.ids)] != done.ids:
            wrong = "rewrites an earlier answer once later turns follow"
        elif whole[: len(before)] != before:
            wrong = "does not start the answer where its generation prompt ends"
        elif end is None:
            wrong = "does not end the answer with exactly one end token"
        if wrong is not None:
            raise UnrenderableError(
                f"{place}: {_turn(turns)} cannot be split into prompt and answer because {chat.origin} {wrong}"
            )
        assert end is not None
        said = self._tokenizer.decode(whole[len(before) : end], clean_up_tokenization_spaces=False)
        header = chat.generation_prompt
        if header and said.lstrip().startswith(header) and not turns[-1]["content"].lstrip().startswith(header):
            raise UnrenderableError(
                f"{place}: {_turn(turns)} cannot be trained because {chat.origin} writes {header[:40]!r} before it and "
                "leaves that out where it is asked for"
            )
        lost = missing_of_answer(turns[-1], said, self._tokenized)
        if lost is not None:
            raise UnrenderableError(
                f"{place}: {_turn(turns)} cannot be trained because {chat.origin} drops {_quoted(*lost)}"
            )
        upto = None
        if done.text is not None and whole[end] == self.end_token_id and whole_text.startswith(text):
            found = whole_text.find(self._end_text, len(text))
            upto = whole_text[:found] if found >= 0 else None
        return _Done(whole[: end + 1], upto), (len(before), end + 1), text

    def _ids_after(self, done: _Done, text: str) -> list[int]:
        """Tokenize a text, from the end token of the answer before on where it starts with what is done."""
        if not done.ids or done.text is None or not text.startswith(done.text + self._end_text):
            return self._ids(text)
        rest = self._ids(text[len(done.text) :])
        return [*done.ids, *rest[1:]] if rest[0] == self.end_token_id else self._ids(text)

    @cached_property
    def _end_text(self) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(self.end_token_id))

    def _end_of(self, whole: list[int], start: int, turn: Message) -> int | None:
        """Return the index of the token that ends an answer; after it only white space and special tokens may stand."""
        end = next((index for index in range(start, len(whole)) if whole[index] == self.end_token_id), None)
        if end is None and "tool_calls" in turn:  # some templates end a call by a token of its own
            end = next((index for index in range(len(whole) - 1, start, -1) if whole[index] in self._special), None)
        if end is None:
            return None
        rest = [token for token in whole[end + 1 :] if token not in self._special]
        return None if self._tokenizer.decode(rest).strip() else end

    def _require_prompt(self, turns: list[Message], text: str, place: str) -> None:
        """Refuse a rendering that lacks what stands before an answer."""
        assert self._chat is not None
        lost = missing_of_prompt(turns, text)
        if lost is None and turns[0]["role"] == "tools" and self._chat.text(turns[1:], place, prompt=True) == text:
            lost = "the column 'tools'", turns[0]["content"]
        if lost is not None:
            raise UnrenderableError(
                f"{place}: {self._chat.origin} drops {_quoted(*lost)}, so that no model would see it"
            )

    def _tokenized(self, text: str) -> str:
        """Return a text as the tokenizer keeps it; nothing where it has no token for a part of it."""
        ids = self._ids(text)
        unknown = self._tokenizer.unk_token_id is not None and self._tokenizer.unk_token_id in ids
        return "\0" if unknown else str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _with_advice(
        self, error: UnrenderableError, conversation: Conversation, attempt: Callable[[Template, Conversation], object]
    ) -> PromptError:
        """Return the error with what to do about it, tried on the row itself."""
        if not self._advise:
            return error
        kind = str(error).removeprefix(conversation.place)
        kind = re.sub(r"turn \d+|'[^']*'", "", kind).partition(" (")[0]
        if kind not in self._advice or self._rows_advised < ROWS_ADVISED:
            self._rows_advised += 1
            self._advice[kind] = way_out(
                conversation,
                self._source,
                lambda source, row: attempt(Template(self._tokenizer, source, advise=False), row),
            )
        return PromptError(f"{error}; {self._advice[kind]}")

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
        trained_answers(rest, place)
        _require_plain(rest, place)
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
        """Put the source's system text before the turns (after the tools) where the row has none of its own."""
        tools, talk = turns[:1], turns[1:]
        if turns[0]["role"] != "tools":
            tools, talk = [], turns
        if self._source.system is None or not talk or talk[0]["role"] == "system":
            return turns
        return [*tools, {"role": "system", "content": self._source.system}, *talk]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _bos(self) -> list[int]:
        """The BOS token as a list where the tokenizer starts plain text with one, else nothing."""
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and self._tokenizer("a")["input_ids"][:1] == [bos] else []


class Templates(tuple[Template, ...]):
    """The templates of some sources, in their order."""

    __slots__ = ()

    @property
    def ends(self) -> list[int]:
        """End token of each; -1 where nothing is rendered."""
        return [template.end_token_id for template in self]

    @property
    def unread_settings(self) -> list[str]:
        """Return a sentence for each setting of a source that its chat template does not read."""
        return [sentence for template in self for sentence in template.unread_settings]

    def require_date(self) -> None:
        """Refuse a template that reads the clock where the recipe names no date; errors as for one of them."""
        for template in self:
            template.require_date()


def _turns(conversation: Conversation) -> list[Message]:
    try:
        return prompt_turns(conversation.messages)
    except ValueError as error:
        raise PromptError(f"{conversation.place}: {error}") from error


def trained_answers(messages: list[Message], place: str) -> list[int]:
    """Return the indices of the answers that the row asks to train, in order.

    Raises:
        PromptError: with `place`, where there is none.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise PromptError(f"{place}: {NO_ANSWER}")
    trained = [index for index in answers if messages[index].get("train", True)]
    if not trained:
        raise PromptError(
            f"{place}: every answer of the row is marked as context, so there is nothing to train; remove the row"
        )
    return trained


def _turn(turns: list[Message]) -> str:
    return f"turn {sum(turn['role'] != 'tools' for turn in turns)}"


def _quoted(what: str, text: str) -> str:
    return f"{what} ({text[:40]!r})"


def _require_plain(turns: list[Message], place: str) -> None:
    odd = next((key for turn in turns for key in turn if key not in ("role", "content", "train")), None)
    if odd is not None:
        raise PromptError(
            f"{place}: `template: none` has no place for {odd!r}; leave it out knowingly with `ignore: [{odd}]`"
        )


def _plain_prompt(turns: list[Message], place: str) -> str:
    if [turn["role"] for turn in turns] not in (["user"], ["system", "user"]):
        raise PromptError(
            f"{place}: `template: none` takes one prompt, found the turns {', '.join(turn['role'] for turn in turns)}"
        )
    _require_plain(turns, place)
    return "\n\n".join(turn["content"] for turn in turns)


def _tokens(ids: list[int], spans: list[tuple[int, int]]) -> Tokens:
    return np.asarray(ids, dtype=np.int32), np.asarray(spans, dtype=np.int32).reshape(-1, 2)
