"""What a library says about loading, in one sentence: which tensors of a checkpoint and of its class do not meet.

transformers and peft fill the gaps of a checkpoint with random numbers and leave out what fits nothing; both say so
in a report that nobody reads. Tied weights, renamed tensors and what a class declares as ignorable are not in it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from shared.errors import ModelError, is_panic, reason_of

_REPORTS = "transformers.modeling_utils"
"""Logger that transformers writes its table of missing and unexpected tensors to."""

MODEL = "a directory with config.json and safetensors, or a hub id that can be fetched"


@contextmanager
def loading(name: str, expected: str = MODEL) -> Iterator[None]:
    """Turn what a library raises while it loads `name` into one sentence, with its own report, of which nothing is
    printed.

    A lack of memory passes as it is.
    """
    logger, lines = logging.getLogger(_REPORTS), _Lines()
    before = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(lines)
    try:
        yield
    except BaseException as error:  # the libraries raise whatever a broken file makes them raise
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if isinstance(error, ModelError | MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        if "does not support an attention implementation through torch" in str(error):  # only a student asks for one
            raise ModelError(
                f"{name} has no attention 'sdpa' in transformers; set student.attention to eager"
            ) from error
        if "trust_remote_code=True" in str(error):
            raise ModelError(
                f"{name} brings Python of its own, which runs only where its section of the recipe says "
                "`trust_remote_code: true`; read it before you allow it, or choose another model"
            ) from error
        reason = lines.conversion() or reason_of(error)
        kind = " as a language model" if expected == MODEL else ""
        raise ModelError(f"{name} cannot be loaded{kind}: {reason}; expected {expected}") from error
    finally:
        logger.removeHandler(lines)
        logger.level, logger.propagate = before


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' bars of loading and saving out of our own display."""
    from transformers.utils import logging as bars

    was_on = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            bars.enable_progress_bar()


class _Lines(logging.Handler):
    """Keeps what a library reports."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record."""
        self.text.append(record.getMessage())

    def conversion(self) -> str:
        """Return which tensor could not be put together from those of the checkpoint (experts of a layer, say), or
        nothing.
        """
        found = re.search(r"^Error: .* destined for (\S+?)\.?\s", "\n".join(self.text), re.MULTILINE)
        return f"what makes up {found[1]} is missing or of another shape" if found else ""


_NO_WEIGHTS = ".rotary_emb.inv_freq"
"""Frequencies that older checkpoints keep beside the weights; every class computes them."""


class LoadMismatch:
    """Where a checkpoint and its class differ."""

    def __init__(
        self,
        missing: Collection[str] = (),
        unexpected: Collection[str] = (),
        reshaped: Collection[tuple[str, Any, Any]] = (),
    ) -> None:
        """Take names, and (name, shape found, shape of the class)."""
        self.missing = sorted(missing, key=_natural)
        self.unexpected = sorted((name for name in unexpected if not name.endswith(_NO_WEIGHTS)), key=_natural)
        self.reshaped = sorted(reshaped, key=lambda one: _natural(one[0]))

    @classmethod
    def of(cls, report: Any, *, quantised: bool, modules: Collection[str] = ()) -> LoadMismatch:
        """Read a loading report of transformers.

        A checkpoint that is stored quantised holds other tensors in place of a weight (`qweight`, `scales`), and packed
        ones: there a weight is missing where its module has nothing at all, a bias as ever, and a tensor is unexpected
        in a block (`layers.2`) that the class does not have.

        Args:
            report: as `output_loading_info` gives it.
            quantised: whether it is of such a checkpoint.
            modules: names of the class's modules.
        """
        missing, unexpected = report["missing_keys"], report["unexpected_keys"]
        if not quantised:
            return cls(missing, unexpected, report["mismatched_keys"])
        places = {_place(name) for name in unexpected}
        return cls(
            [name for name in missing if name.endswith("bias") or _place(name) not in places],
            [name for name in unexpected if _is_beyond(name, modules)],
        )

    def refuse(self, name: str, class_name: str) -> None:
        """Raise where anything differs.

        Raises:
            ModelError: the first of each kind is named.
        """
        found = []
        for names, words in ((self.missing, "missing"), (self.unexpected, "unexpected")):
            if names:
                found.append(f"{len(names):,} tensor{'s are' if len(names) > 1 else ' is'} {words} (first: {names[0]})")
        if self.reshaped:
            tensor, there, wanted = self.reshaped[0]
            found.append(f"{tensor} is {list(there)} where the class has {list(wanted)} ({len(self.reshaped):,} such)")
        if found:
            lost = "missing tensors would be random numbers" if self.missing else "they would be left out"
            raise ModelError(f"{name} does not fit {class_name}: {' and '.join(found)}; {lost}, so {self._advice()}")

    def _advice(self) -> str:
        missing = set(self.missing)
        for name in self.unexpected:
            for start in (match.end() for match in re.finditer(r"\.", name)):
                if name[start:] in missing:
                    return f"save it again without the prefix '{name[:start]}' of a wrapper"
        return "save it again whole, or correct its config"


def _place(name: str) -> str:
    """Return the module that a tensor is of; the experts of a layer count as one."""
    return re.sub(r"\.[\w-]*experts\..*|\.[^.]*$", "", name)


def _is_beyond(name: str, modules: Collection[str]) -> bool:
    """Tell whether a tensor is of a numbered block that its list lacks, as `model.layers.2.mlp.up.scales` where there
    are two.
    """
    found = re.match(r"(.*?)\.\d+(?=\.)", name)
    return found is not None and found[1] in modules and found[0] not in modules


def _natural(name: str) -> list[Any]:
    """Sort `layers.2` before `layers.10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
