"""What ends an answer, and what of it is kept: the same rule for every engine.

An answer ends at one of its end tokens (kept, the last token), at a stop text (cut off), at its length, or because the
engine gave it up. A stop text is no part of the answer: tokens that lie before it stay as the model wrote them; of a
token that reaches into it the text before is tokenized again (" seven" with the stop text "e" leaves " s"), or dropped
where it would not read back as that text. Nothing is put in its place: the model wrote no end there.

A stop text that is exactly a special token's (`<|eot_id|>`) is an end token; decoded text leaves special tokens out, so
one that only contains a special token would never be met and is refused.
Cost: one decoding per answer that a stop text ended, and a few more of prefixes to find the token that reaches into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UsageError
from shared.models.end_tokens import declared_end_ids, end_token_ids
from shared.recipe.recipe import Generate
from teacher_cache.engines.protocol import FINISHED, Generated


@dataclass(frozen=True, slots=True)
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

        Raises:
            UsageError: a stop text contains a special token.
        """
        ids, texts = split_stops(tokenizer, settings.stop)
        return cls(tokenizer, end_token_ids(tokenizer, declared, ids), texts)

    def with_template(self, end_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the end tokens of a request whose template ends answers with `end_ids`."""
        return tuple(dict.fromkeys(token for token in (*end_ids, *self.token_ids) if token >= 0))

    def answer(self, tag: Any, token_ids: list[int], reason: str, *, by_text: bool = False) -> Generated:
        """Return what is kept of an answer.

        Args:
            tag: the request's.
            token_ids: everything that the engine returned.
            reason: as the engine calls the end.
            by_text: the engine says that a stop text ended it.
        """
        kept = self.cut(token_ids) if self.texts and reason in FINISHED else None
        if kept is not None:
            return Generated(tag, kept, "stop", cut_at_stop=True)
        return Generated(tag, token_ids, "a stop text that its tokens do not spell" if by_text else reason)

    def cut(self, token_ids: list[int]) -> list[int] | None:
        """Return the tokens of an answer before its first stop text; None where its text holds none.

        With the stop text "e", the tokens of ["Half", " a", " dozen", ";"] become those of ["Half", " a", " doz"].
        """
        text = self._text(token_ids)
        places = [place for place in (text.find(stop) for stop in self.texts) if place >= 0]
        if not places:
            return None
        kept = text[: min(places)]
        whole = len(token_ids)
        while whole and not kept.startswith(self._text(token_ids[:whole])):
            whole -= 1
        rest = kept[len(self._text(token_ids[:whole])) :]
        again = [*token_ids[:whole], *self.tokenizer(rest, add_special_tokens=False)["input_ids"]]
        return again if self._text(again) == kept else token_ids[:whole]

    def _text(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def foreign_ends(
    template_ends: Sequence[int], tokenizer: Any, model_dir: Path, generate: Generate | None
) -> list[int | None]:
    """Return each source's end token where the model that answers would not end there by itself, else None.

    Where eos is 0 and templates end with 2, 0 and nothing (-1), that is [2, None, None].

    Raises:
        UsageError: a stop text can never be met.
        EngineError: the model's files name what is no token.
    """
    if generate is None:
        return []
    own = AnswerEnds.of(tokenizer, declared_end_ids(model_dir), generate).token_ids
    return [None if end < 0 or end in own else end for end in template_ends]


def split_stops(tokenizer: Any, stops: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the token ids of stop texts that are special tokens, and the other stop texts.

    Raises:
        UsageError: a stop text contains a special token besides other text.
    """
    special = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for stop in stops:
        inside = next((content for content in special if content in stop), None)
        if stop not in special and inside is not None:
            raise UsageError(
                f"generate.stop: {stop!r} contains the special token {inside!r}, which an answer's text never shows; "
                "write "
                f"{inside!r} alone, which ends answers as a token, or leave it out"
            )
    texts = tuple(stop for stop in stops if stop not in special)
    return tuple(special[stop] for stop in stops if stop in special), texts
