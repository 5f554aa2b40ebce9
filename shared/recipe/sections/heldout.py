"""What a recipe may say about the rows that no stage trains on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.recipe.base import (
    Fraction,
    Section,
)


class Heldout(Section):
    """Prompts that no stage trains on."""

    fraction: Annotated[Fraction, Field(lt=1)] = 0.05
    """Share of prompt groups held out, chosen by a hash of the prompt."""
