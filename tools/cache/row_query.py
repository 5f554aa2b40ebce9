"""`--query`: which rows of a cache, as a condition on their columns.

    source == "math" and num_tokens < 512 and "integral" in prompt and not finish_reason == "length"

Names are columns, numbers and texts are written as in Python; `and`, `or`, `not`, comparisons, `in` and brackets are
all there is. The condition is read as a syntax tree and evaluated node by node; nothing is run. Cost: per row the
nodes.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from shared.errors import UsageError
from shared.parts.sequences import SequenceRow
from shared.recipe.base import closest

COLUMNS: Mapping[str, Callable[[SequenceRow], Any]] = {
    "source": lambda row: row.source,
    "prompt": lambda row: row.prompt,
    "response": lambda row: row.response,
    "reference": lambda row: row.reference or "",
    "finish_reason": lambda row: row.finish_reason,
    "num_tokens": lambda row: len(row.token_ids),
    "num_positions": lambda row: row.num_positions,
}
"""What a condition may name."""
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_MOST_LETTERS = 10_000
_MOST_LEVELS = 100
"""Of brackets and `not` within one another."""


class Condition:
    """A condition on a row.

    >>> Condition('num_tokens < 3 or source in ("math", "code")').text
    'num_tokens < 3 or source in ("math", "code")'
    """

    def __init__(self, text: str) -> None:
        """Parse the condition.

        Raises:
            UsageError: it is none, or names something that is no column.
        """
        self.text = text
        if len(text) > _MOST_LETTERS:
            raise UsageError(
                f"--query has {len(text):,} letters and may have {_MOST_LETTERS:,}; choose in several steps"
            )
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UsageError(
                f"--query {text!r} is no condition ({error}); write one such as num_tokens < 512"
            ) from None
        self._check(self._tree)

    def __call__(self, row: SequenceRow) -> bool:
        """Tell whether a row fulfils it.

        Raises:
            UsageError: a text is compared with a number.
        """
        try:
            return bool(self._value(self._tree, row))
        except TypeError as error:
            raise UsageError(f"--query {self.text!r} compares what cannot be compared ({error})") from None

    def _check(self, node: ast.expr, level: int = 0) -> None:
        if level > _MOST_LEVELS:
            raise UsageError(f"--query is nested deeper than {_MOST_LEVELS} levels; write it flat")
        match node:
            case ast.BoolOp(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
                pass
            case ast.UnaryOp(op=ast.Not(), operand=part):
                parts = [part]
            case ast.Compare(left=left, ops=kinds, comparators=others) if {*map(type, kinds)} <= _COMPARISONS.keys():
                parts = [left, *others]
            case ast.Constant(value=int() | float() | str()):
                parts = []
            case ast.Name(id=name) if name in COLUMNS:
                parts = []
            case ast.Name(id=name):
                near = closest(name, sorted(COLUMNS))
                raise UsageError(f"--query names {name!r}, which is no column; there are {', '.join(COLUMNS)}{near}")
            case _:
                raise UsageError(
                    f"--query has {ast.unparse(node)!r}, which is not understood; columns, numbers, texts in quotes, "
                    "comparisons, in, and, or, not are"
                )
        for part in parts:
            self._check(part, level + 1)

    def _value(self, node: ast.expr, row: SequenceRow) -> Any:
        match node:
            case ast.BoolOp(op=kind, values=parts):
                return (all if isinstance(kind, ast.And) else any)(self._value(part, row) for part in parts)
            case ast.UnaryOp(operand=part):
                return not self._value(part, row)
            case ast.Compare(left=left, ops=kinds, comparators=others):
                values = [self._value(part, row) for part in (left, *others)]
                return all(_COMPARISONS[type(k)](a, b) for k, a, b in zip(kinds, values, values[1:], strict=False))
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return tuple(self._value(part, row) for part in parts)
            case ast.Name(id=name):
                return COLUMNS[name](row)
            case ast.Constant(value=value):
                return value
        raise AssertionError(node)
