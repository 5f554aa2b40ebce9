"""What ends an answer, and what of it is kept: the same rule for every engine.

An answer ends at one of its end tokens (kept, the last token), at a stop text (cut off), at its length, or because the
engine gave it up. A stop text is no part of the answer: tokens that lie before it stay as the model wrote them; of a
token that reaches into it the text before is tokenized again (" seven" with the stop text "e" leaves " s"), or dropped
where it would not read back as that text. Nothing is put in its place: the model wrote no end there.

Stop texts are looked for in text with special tokens spelled out, as whoever writes `<|im_start|>user` expects; only
the end token that closed an answer is no part of it. A stop text that is exactly a special token's is an end token.
Cost: one decoding per answer that a stop text ended, and a few more of prefixes to find the token that reaches into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.models.end_tokens import declared_end_ids, end_token_ids
from shared.recipe.recipe import Generate
from teacher_cache.engines.protocol import FINISHED, Generated, GenerateRequest


@dataclass(frozen=True)
class AnswerEnds:
    """What ends the answers of one stream of requests."""

    tokenizer: Any
    token_ids: tuple[int, ...]
    """End tokens of the model and of stop texts that are special tokens."""
    texts: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any, declared: Sequence[int], settings: Generate) -> AnswerEnds:
        """Sort a recipe's stop texts into end tokens and texts.

        Args:
            tokenizer: of the model that answers.
            declared: end tokens that its files declare.
            settings: the recipe's section.
        """
        ids, texts = split_stops(tokenizer, settings.stop)
        return cls(tokenizer, end_token_ids(tokenizer, declared, ids), texts)

    def with_template(self, end_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the end tokens of a request whose template ends answers with `end_ids`."""
        return tuple(dict.fromkeys(token for token in (*end_ids, *self.token_ids) if token >= 0))

    def answer(
        self, request: GenerateRequest, token_ids: list[int], reason: str, *, by_text: bool = False
    ) -> Generated:
        """Return what is kept of an answer.

        Args:
            request: what was answered.
            token_ids: everything that the engine returned.
            reason: as the engine calls the end.
            by_text: the engine says that a stop text ended it.
        """
        kept = self.cut(token_ids, request.end_token_ids) if reason in FINISHED else None
        if kept is not None:
            return Generated(request.tag, kept, "stop", cut_at_stop=True)
        return Generated(request.tag, token_ids, "a stop text that its tokens do not spell" if by_text else reason)

    def cut(self, token_ids: list[int], template_ends: Sequence[int] = ()) -> list[int] | None:
        """Return the tokens of an answer before its first stop text; None where its text holds none.

        With the stop text "e", the tokens of ["Half", " a", " dozen", ";"] become those of ["Half", " a", " doz"].

        Args:
            token_ids: of the answer, with the end token that closed it.
            template_ends: end tokens of the request's template.
        """
        if not self.texts:
            return None
        if token_ids and token_ids[-1] in self.with_template(template_ends):
            token_ids = token_ids[:-1]
        text = self._text(token_ids)
        places = [place for place in (text.find(stop) for stop in self.texts) if place >= 0]
        if not places:
            return None
        kept = text[: min(places)]
        whole = len(token_ids)
        while whole and not kept.startswith(self._text(token_ids[:whole])):
            whole -= 1
        if whole < len(token_ids) and token_ids[whole] in self._special_ids:
            return token_ids[:whole]
        rest = kept[len(self._text(token_ids[:whole])) :]
        again = [*token_ids[:whole], *self.tokenizer(rest, add_special_tokens=False)["input_ids"]]
        return again if self._text(again) == kept else token_ids[:whole]

    def _text(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(_special_tokens(self.tokenizer).values())


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    return {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}


def foreign_ends(
    template_ends: Sequence[int], tokenizer: Any, model_dir: Path, generate: Generate | None
) -> list[int | None]:
    """Return each source's end token where the model that answers would not end there by itself, else None.

    Where eos is 0 and templates end with 2, 0 and nothing (-1), that is [2, None, None].

    Raises:
        EngineError: the model's files name what is no token.
    """
    if generate is None:
        return []
    own = AnswerEnds.of(tokenizer, declared_end_ids(model_dir), generate).token_ids
    return [None if end < 0 or end in own else end for end in template_ends]


def split_stops(tokenizer: Any, stops: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the token ids of stop texts that are special tokens, and the other stop texts."""
    special = _special_tokens(tokenizer)
    texts = tuple(stop for stop in stops if stop not in special)
    return tuple(special[stop] for stop in stops if stop in special), texts
