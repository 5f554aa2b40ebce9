"""A tokenizer's chat template as a function from turns to token ids, and the end token that it implies.

The template renders text, the text is tokenized, and nothing is added: a template writes its own special tokens. The
end token
is found on a probe: the first special token after the answer, with at most white space before it. Without one a student
would never learn to stop, so such a template is refused. The clock that templates can read is replaced by the recipe's
date.
Cost: one rendering for the probe; then one rendering and tokenization per call.
"""

from __future__ import annotations

import datetime
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from shared.cache.rendering import template_text
from shared.errors import ModelError, PromptError, reason_of
from shared.models.bounded_templates import render
from shared.models.end_tokens import special_ids
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.formats.prompt_turns import Message, texts_in

CLOCK = "strftime_now"
"""What templates call for the current date: the only clock that transformers gives them."""

_CHANCE = re.compile(r"\|\s*random\b|\blipsum\s*\(")
"""What a template writes otherwise each time."""

PROBE_QUESTION, PROBE_ANSWER = "decant probe question", "decant probe answer"


class UnrenderableError(PromptError):
    """A template cannot render or split a row; the message has the place and the reason, and wants advice."""


class ChatTemplate:
    """One source's template, settings included."""

    def __init__(self, tokenizer: Any, source: PromptSource) -> None:
        """Read the template and derive its end token.

        Raises:
            PromptError: the tokenizer has no template, it cannot render, or it ends no answer with a token.
        """
        self._tokenizer = tokenizer
        self._source = source
        self._text = template_text(source.chat_template) or str(_own_text(tokenizer, source))
        self._text_with_tools = None if source.chat_template else _own_text(tokenizer, source, "tool_use")
        self._special = special_ids(tokenizer)
        self._special_texts = tuple(sorted(tokenizer.convert_ids_to_tokens(sorted(self._special))))
        self.origin = "`chat_template` of the recipe" if source.chat_template else "the tokenizer's chat template"
        self._refuse_chance()
        self.reads_clock = False
        """Whether a rendering asked for the date so far."""
        self._refuse(texts_in(source.chat_template_kwargs), f"source {source.source!r}", "`chat_template_kwargs`")
        self.generation_prompt = ""
        """What asks for the answer to a question, white space around it aside; nothing where it cannot be told."""
        probe = self._probe()
        self.end_token_id = self._derive_end_token(probe)
        self._require_generation_prompt(probe)
        self._special_texts += self._marks_of_turns(probe)
        written = set(self.tokenize(probe))
        self.other_end_ids = frozenset(
            token
            for token in self._special - written
            if tokenizer.convert_ids_to_tokens(token) in f"{self._text}{self._text_with_tools or ''}"
        )
        """Special tokens that the template writes, and not around plain turns: such as end a call of a tool."""

    @property
    def unread_settings(self) -> list[str]:
        """Return a sentence for each setting whose word stands in no template, so that it does nothing."""
        texts = f"{self._text}\n{self._text_with_tools or ''}"
        known = inspect.signature(self._tokenizer.apply_chat_template).parameters
        settings = {f"chat_template_kwargs.{name}": name for name in self._source.chat_template_kwargs}
        unread = [key for key, name in settings.items() if not re.search(rf"\b{re.escape(name)}\b", texts)]
        unread = [key for key in unread if settings[key] not in known]
        unread += ["date"] if self._source.date is not None and CLOCK not in texts else []
        return [f"source {self._source.source}: `{key}` does nothing, {self.origin} does not read it" for key in unread]

    def ids(self, messages: list[Message], place: str, *, prompt: bool) -> list[int]:
        """Render and tokenize turns, with the generation prompt where `prompt` says so.

        Raises:
            PromptError: with `place`, when the template refuses the conversation.
        """
        return self.tokenize(self.text(messages, place, prompt=prompt))

    def refuse_special_text(self, messages: list[Message], place: str) -> None:
        """Refuse turns that spell a special token anywhere, which tokenizing would turn into the token itself.

        Raises:
            PromptError: with `place` and the token.
        """
        for message in messages:
            self._refuse(texts_in(message), place, f"the {message['role']} turn")

    def text(self, messages: list[Message], place: str, *, prompt: bool) -> str:
        """Render turns, with the generation prompt where `prompt` says so.

        Raises:
            UnrenderableError: with `place`, when the template refuses the conversation.
            PromptError: it writes the current date and the recipe names none.
        """
        text = self._render(messages, place, prompt=prompt)
        if self.reads_clock and self._source.date is None:
            raise PromptError(f"{place}: {self.clock_problem}")
        return text

    @property
    def clock_problem(self) -> str:
        """Say what is wrong with a template that reads the clock, and what to do."""
        today = datetime.date.today().isoformat()
        return (
            f"{self.origin} writes the current date, so that the same row would have other tokens tomorrow; name a "
            f"date for all rows, such as `date: {today}`"
        )

    def _render(self, messages: list[Message], place: str, *, prompt: bool) -> str:
        turns = [
            {key: value for key, value in message.items() if key != "train"}
            for message in messages
            if message["role"] != "tools"
        ]
        settings = dict(self._source.chat_template_kwargs)
        tools = next((json.loads(message["content"]) for message in messages if message["role"] == "tools"), None)
        if tools is not None and "tools" in settings:
            raise PromptError(f"{place}: the row has tools and so has `chat_template_kwargs`; leave one of both out")
        template = (self._text_with_tools if tools is not None else None) or self._text
        if tools is not None:
            settings["tools"] = tools
        if CLOCK in template:
            settings.setdefault(CLOCK, self._now)
        try:
            text = self._apply(template, turns, prompt, settings)
        except ModelError as error:  # of its bounds, which no other row would keep
            raise ModelError(f"{place}: {error}") from None
        except Exception as error:  # a template raises what it likes
            reason = reason_of(error, 200)
            raise UnrenderableError(f"{place}: the chat template cannot render the conversation ({reason})") from error
        return str(text)

    def _apply(self, template: str, turns: list[Message], prompt: bool, settings: Mapping[str, Any]) -> Any:
        """Render turns, with the arguments of tool calls as objects, or as JSON text where the template wants text."""

        def applied(some: list[Message]) -> Any:
            return render(
                self._tokenizer, some, self.origin, chat_template=template, add_generation_prompt=prompt, **settings
            )

        try:
            return applied(turns)
        except TypeError:
            spelled = [_with_arguments_as_text(turn) for turn in turns]
            if spelled == turns:
                raise
            return applied(spelled)

    def _now(self, pattern: str) -> str:
        """Stand in for the clock of templates (`strftime_now`)."""
        self.reads_clock = True
        date = self._source.date or datetime.date(2000, 1, 1)
        return datetime.datetime.combine(date, datetime.time()).strftime(pattern)

    def _refuse_chance(self) -> None:
        found = _CHANCE.search(f"{self._text}\n{self._text_with_tools or ''}")
        if found is not None:
            raise PromptError(
                f"source {self._source.source!r}: {self.origin} draws what it writes ({found[0]!r}), so that the same "
                "row would have other tokens each time; write one text in its place, in `chat_template`"
            )

    def _refuse(self, texts: Iterable[str], place: str, where: str) -> None:
        starts = {text[0] for text in self._special_texts if text}
        for text in texts:
            if starts.isdisjoint(text):
                continue
            special = next((one for one in self._special_texts if one in text), None)
            if special is not None:
                raise PromptError(
                    f"{place}: {where} contains the special token {special!r} as text, which would become the token "
                    "itself; remove it, or use `template: none` for text that is rendered already"
                )

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text; nothing is added."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _probe(self) -> str:
        """Return the rendering of a question and its answer."""
        turns = [{"role": "user", "content": PROBE_QUESTION}, {"role": "assistant", "content": PROBE_ANSWER}]
        try:
            return self._render(turns, f"source {self._source.source!r}", prompt=False)
        except UnrenderableError as error:
            settings = "`chat_template_kwargs`, or " if self._source.chat_template_kwargs else ""
            way = "correct it" if self._source.chat_template else "give another in `chat_template`"
            raise UnrenderableError(f"{error}; {settings and 'correct '}{settings}{way}") from error

    def _require_generation_prompt(self, probe: str) -> None:
        """Refuse a template that writes something before an answer and nothing of it where one is asked for.

        Its students would be trained to write the header of a turn, and asked without it.
        """
        name, question = f"source {self._source.source!r}", [{"role": "user", "content": PROBE_QUESTION}]
        try:
            bare, asked = (self._render(question, name, prompt=prompt) for prompt in (False, True))
        except UnrenderableError:
            return  # a question alone is no conversation of it
        self.generation_prompt = asked.removeprefix(bare).strip() if asked.startswith(bare) else ""
        header = probe.removeprefix(asked).partition(PROBE_ANSWER)[0].strip()
        if bare == asked and header and probe.startswith(asked):
            raise PromptError(
                f"{name}: {self.origin} writes {header[:40]!r} before an answer and leaves it out where one is asked "
                "for, so that it would be trained as a part of the answer; write it at the end of `chat_template` "
                "within {% if add_generation_prompt %}"
            )

    def _marks_of_turns(self, probe: str) -> tuple[str, ...]:
        """Return added tokens that are not marked as special and that the template writes around turns.

        Those that come in pairs, as `<think>` and `</think>`, are what an answer may say.
        """
        added = {token.content for token in self._tokenizer.added_tokens_decoder.values() if not token.special}
        pairs = {text for text in added if f"{text[:1]}/{text[1:]}" in added or text[1:2] == "/"}
        return tuple(sorted(text for text in added - pairs if text in self._text or text in probe))

    def _derive_end_token(self, text: str) -> int:
        name = f"source {self._source.source!r}"
        _, found, after = text.rpartition(PROBE_ANSWER)
        if not found:
            raise PromptError(
                f"{name}: {self.origin} does not render an answer's text as it is; expected it in the rendering"
            )
        before: list[int] = []
        for token in self.tokenize(after):
            if token not in self._special:
                before.append(token)
            elif self._tokenizer.decode(before).strip():
                break
            else:
                return token
        raise PromptError(
            f"{name}: {self.origin} puts {after[:40]!r} after an answer; expected a special token directly after it, "
            "so that a student learns to stop; change `chat_template`"
        )


def _with_arguments_as_text(turn: Message) -> Message:
    """Return a turn whose tool calls spell their arguments as JSON.

    >>> _with_arguments_as_text({"tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]})
    {'tool_calls': [{'function': {'name': 'f', 'arguments': '{"a": 1}'}}]}
    """
    if "tool_calls" not in turn:
        return turn
    functions = [(call, call["function"]) for call in turn["tool_calls"]]
    spelled = [
        {**call, "function": {**one, "arguments": json.dumps(one["arguments"], ensure_ascii=False)}}
        for call, one in functions
    ]
    return {**turn, "tool_calls": spelled}


def _own_text(tokenizer: Any, source: PromptSource, name: str = "default") -> str | None:
    """Return the tokenizer's template of a name; there is none for rows with tools where all rows have one template."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get(name)
    elif name != "default":
        return None
    if not template and name == "default":
        raise PromptError(
            f"source {source.source!r}: the tokenizer has no chat template; set `template: none` or give one in "
            "`chat_template`"
        )
    return str(template) if template else None
