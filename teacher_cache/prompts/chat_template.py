"""A tokenizer's chat template as a function from turns to token ids, and the end token that it implies.

The template renders text, the text is tokenized, and nothing is added: a template writes its own special tokens. The
end token
is found on a probe: the first special token after the answer, with at most white space before it. Without one a student
would never learn to stop, so such a template is refused.
Cost: one rendering for the probe; then one rendering and tokenization per call.
"""

from __future__ import annotations

from typing import Any

from shared.cache.rendering import template_text
from shared.errors import PromptError
from shared.models.end_tokens import special_ids
from shared.recipe.recipe import PromptSource
from teacher_cache.prompts.prompt_formats import Message

PROBE_QUESTION, PROBE_ANSWER = "decant probe question", "decant probe answer"


class ChatTemplate:
    """One source's template, settings included."""

    def __init__(self, tokenizer: Any, source: PromptSource) -> None:
        """Read the template and derive its end token.

        Raises:
            PromptError: the tokenizer has no template, it cannot render, or it ends no answer with a token.
        """
        self._tokenizer = tokenizer
        self._source = source
        self._text = template_text(source.chat_template) or _own_text(tokenizer, source)
        self._special = special_ids(tokenizer)
        self._special_texts = tuple(sorted(tokenizer.convert_ids_to_tokens(sorted(self._special))))
        self.origin = "`chat_template` of the recipe" if source.chat_template else "the tokenizer's chat template"
        self.end_token_id = self._derive_end_token()

    def ids(self, messages: list[Message], place: str, *, prompt: bool) -> list[int]:
        """Render and tokenize turns, with the generation prompt where `prompt` says so.

        Raises:
            PromptError: with `place`, when the template refuses the conversation.
        """
        return self._tokenize(self.text(messages, place, prompt=prompt))

    def refuse_special_text(self, messages: list[Message], place: str) -> None:
        """Refuse turns that spell a special token, which tokenizing would turn into the token itself.

        Raises:
            PromptError: with `place` and the token.
        """
        for message in messages:
            for special in self._special_texts:
                if special in message["content"]:
                    raise PromptError(
                        f"{place}: the {message['role']} turn contains the special token {special!r} as text, which "
                        "would become "
                        "the token itself; remove it, or use `template: none` for text that is rendered already"
                    )

    def text(self, messages: list[Message], place: str, *, prompt: bool) -> str:
        """Render turns, with the generation prompt where `prompt` says so.

        Raises:
            PromptError: with `place`, when the template refuses the conversation.
        """
        settings = self._source.chat_template_kwargs
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=self._text, tokenize=False, add_generation_prompt=prompt, **settings
            )
        except Exception as error:  # a template raises what it likes
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise PromptError(f"{place}: the chat template cannot render the conversation ({reason})") from error
        return str(text)

    def _tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _derive_end_token(self) -> int:
        name = f"source {self._source.source!r}"
        turns = [{"role": "user", "content": PROBE_QUESTION}, {"role": "assistant", "content": PROBE_ANSWER}]
        text = self.text(turns, name, prompt=False)
        _, found, after = text.rpartition(PROBE_ANSWER)
        if not found:
            raise PromptError(
                f"{name}: {self.origin} does not render an answer's text as it is; expected it in the rendering"
            )
        before: list[int] = []
        for token in self._tokenize(after):
            if token not in self._special:
                before.append(token)
            elif self._tokenizer.decode(before).strip():
                break
            else:
                return token
        raise PromptError(
            f"{name}: {self.origin} puts {after[:40]!r} after an answer; expected a special token directly after it, "
            "so that a "
            "student learns to stop; change `chat_template`"
        )


def _own_text(tokenizer: Any, source: PromptSource) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise PromptError(
            f"source {source.source!r}: the tokenizer has no chat template; set `template: none` or give one in "
            "`chat_template`"
        )
    return str(template)
