"""Every optimizer that a stage may name, with what each costs and needs: the one table.

Names are those of transformers. Bytes of state per trained weight are counted from the published layouts: bitsandbytes
and torchao quantise blocks of 256 and 128 numbers with a float32 scale each; bitsandbytes keeps the states of
embeddings in 32 bits; Adafactor keeps a row and a column per matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

_OF_8_BITS = 1.02
"""Bytes of one state number in 8 bits, its share of the scales included."""
_OF_4_BITS = 0.53


ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
"""Settings of a stage's trainer that not every optimizer reads."""
_LION = ADAM[:2]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What one optimizer costs and needs."""

    states: int
    """Numbers that it keeps per trained weight."""
    number_bytes: float | None = None
    """Bytes of each; None: as wide as the weight."""
    reads: tuple[str, ...] = ADAM
    """Which of `ADAM` it reads, as transformers hands them on."""
    package: str | None = None
    """What must be installed besides torch and transformers."""
    is_paged: bool = False
    """Its state lies in memory that the driver moves to the host when the card is full; needs an NVIDIA GPU."""
    is_elementwise: bool = False
    """Its update of a shard is the shard of its update, so that weights may be sharded."""
    updates_in_place: bool = False
    """An update needs no copy of the state."""
    wide_embeddings: bool = False
    """States of embeddings are kept in 32 bits."""
    divides_by_squares: bool = True
    """By the root of mean squares of gradients, that is."""
    loses_rare_tokens: bool = False
    """Mean squares of gradients are kept in 8 bits of embeddings too: those of rare tokens become 0 beside frequent
    ones, and what is divided by their root explodes. *Measured* on rows that are seen now and then: weights of 1,800
    where AdamW's are 0.2."""

    @property
    def steps_weight_by_weight(self) -> bool:
        """Return whether it can be called for one weight at a time: nothing is counted or moved per call."""
        return self.is_elementwise or (self.package == "bitsandbytes" and not self.is_paged)

    @property
    def keeps_narrow_squares(self) -> bool:
        """Return whether it divides by squares that are kept as narrow as the weights: in float16, those of gradients
        below 2e-4 are 0.
        """
        return self.divides_by_squares and self.number_bytes is None

    def state_bytes(self, weight_bytes: int) -> float:
        """Return bytes of state per trained weight of so many bytes: 8.0 for AdamW on float32 weights."""
        return self.states * (weight_bytes if self.number_bytes is None else self.number_bytes)


def _bnb(states: int, number_bytes: float, reads: tuple[str, ...] = ADAM, *, is_paged: bool = False) -> Optimizer:
    in_8_bits = number_bytes < 4
    return Optimizer(
        states,
        number_bytes,
        reads,
        "bitsandbytes",
        is_paged,
        updates_in_place=True,
        wide_embeddings=in_8_bits and not is_paged,
    )


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch": Optimizer(2, is_elementwise=True),
    "adamw_torch_fused": Optimizer(2, is_elementwise=True, updates_in_place=True),
    "adamw_torch_8bit": Optimizer(2, _OF_8_BITS, package="torchao", updates_in_place=True, loses_rare_tokens=True),
    "adamw_torch_4bit": Optimizer(2, _OF_4_BITS, package="torchao", updates_in_place=True),
    "adafactor": Optimizer(1, 0.1, ()),
    "sgd": Optimizer(0, reads=(), is_elementwise=True, updates_in_place=True, divides_by_squares=False),
    "adagrad": Optimizer(1, reads=(), is_elementwise=True),
    "rmsprop": Optimizer(1, reads=(), is_elementwise=True),
    "adamw_8bit": _bnb(2, _OF_8_BITS),
    "adamw_bnb_8bit": _bnb(2, _OF_8_BITS),
    "ademamix": _bnb(3, 4),
    "ademamix_8bit": _bnb(3, _OF_8_BITS),
    "lion_8bit": _bnb(1, _OF_8_BITS, _LION),
    "lion_32bit": _bnb(1, 4, _LION),
    "rmsprop_bnb": _bnb(1, 4, ()),
    "rmsprop_bnb_8bit": _bnb(1, _OF_8_BITS, ()),
    "rmsprop_bnb_32bit": _bnb(1, 4, ()),
    "paged_adamw_8bit": _bnb(2, _OF_8_BITS, is_paged=True),
    "paged_adamw_32bit": _bnb(2, 4, is_paged=True),
    "paged_ademamix_8bit": _bnb(3, _OF_8_BITS, is_paged=True),
    "paged_ademamix_32bit": _bnb(3, 4, is_paged=True),
    "paged_lion_8bit": _bnb(1, _OF_8_BITS, _LION, is_paged=True),
    "paged_lion_32bit": _bnb(1, 4, _LION, is_paged=True),
    "grokadamw": Optimizer(3, reads=(), package="grokadamw"),
    "schedule_free_adamw": Optimizer(2, package="schedulefree"),
    "schedule_free_radam": Optimizer(2, package="schedulefree"),
    "schedule_free_sgd": Optimizer(1, reads=(), package="schedulefree", divides_by_squares=False),
    "stable_adamw": Optimizer(2, package="optimi"),
}
"""By the name that a recipe gives; those that need layers named for them (galore, apollo) are left out."""
