"""Calls of a function across pipes between confined processes, of tests and answer. Standard library only.

The source of this module runs inside the sandbox, before the tests and before the answer. Arguments and results
cross as data, never as objects: None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set,
frozenset; a subclass crosses as its base. So an answer's class, its `__eq__` and its patches of modules never meet
the tests, and arguments are copies. What is no data fails. An exception crosses as its built-in class and text. One
line of JSON per call and per result; whatever else arrives ends the tests.

Cost: linear in the data, about 50 microseconds a call.
"""

from __future__ import annotations

import builtins
import json
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

_PLAIN_INT_BITS = 64
"""Longer integers cross in hexadecimal, which has no limit of digits."""


class Broken(BaseException):
    """The other side sent no result. Not an `Exception`, so that tests that expect one do not take it for theirs."""


def execute(name: str, source: str) -> dict[str, Any]:
    """Run source in a module of that name, made where there is none, and return its namespace."""
    module = sys.modules.setdefault(name, types.ModuleType(name))
    exec(compile(source, name, "exec"), module.__dict__)  # noqa: S102 - behind the sandbox's walls
    return module.__dict__


def encode(value: Any) -> Any:
    """Return data as JSON values, tagged where JSON has no such type; TypeError where it is no data.

    >>> encode({"a": (1, 2.5)})
    {'dict': [['a', {'tuple': [1, 2.5]}]]}
    """
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() <= _PLAIN_INT_BITS else {"int": hex(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes" if isinstance(value, bytes) else "bytearray": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"{type(value).__name__} is no plain data and cannot cross between tests and answer")


def decode(value: Any) -> Any:
    """Return what `encode` was given; ValueError, TypeError or RecursionError where nothing is.

    >>> decode({"dict": [["a", {"tuple": [1, 2.5]}]]})
    {'a': (1, 2.5)}
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "int":
        return int(content, 16)
    if tag == "dict":
        return {decode(key): decode(item) for key, item in content}
    if tag == "complex":
        return complex(*content)
    if tag in ("bytes", "bytearray"):
        return bytes.fromhex(content) if tag == "bytes" else bytearray.fromhex(content)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[tag](decode(item) for item in content)


def caller(pipes: tuple[int, int]) -> Callable[..., Any]:
    """Return the function as the tests see it: each call is answered by the other side of `pipes` (read, write)."""
    # Of descriptors, open to the end.
    results, calls = open(pipes[0], "rb"), open(pipes[1], "wb")  # noqa: PTH123, SIM115

    def function(*args: Any, **kwargs: Any) -> Any:
        """Let the other side compute a call."""
        call = json.dumps(encode([args, kwargs])).encode() + b"\n"
        try:
            calls.write(call)
            calls.flush()
            line = results.readline()
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise Broken("the answer ended without a result")
        try:
            outcome, content = json.loads(line)
            found = decode(content)
        except Exception as error:  # noqa: BLE001 - whatever the answer's side sends, the function did not raise it
            raise Broken(f"the answer sent no data: {type(error).__name__}") from None
        if outcome == "returned":
            return found
        _raise(*(str(part) for part in found))

    return function


def _raise(name: str, text: str) -> NoReturn:
    kind = getattr(builtins, name, None)
    # One that ends an iteration would end that of the tests, as in `all(map(function, cases))`, before a wrong result.
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not StopIteration:
        try:
            error = kind(text)
        except TypeError:  # a class that wants more than a text, such as UnicodeDecodeError
            error = RuntimeError(f"{name}: {text}")
        raise error
    raise RuntimeError(f"{name}: {text}")


def serve(function: Callable[..., Any], pipes: tuple[int, int]) -> None:
    """Answer calls that come from `pipes` (read, write) until there are no more."""
    # Of descriptors, open to the end.
    calls, results = open(pipes[0], "rb"), open(pipes[1], "wb")  # noqa: PTH123, SIM115
    dumps, loads = json.dumps, json.loads
    for line in calls:
        args, kwargs = decode(loads(line))
        try:
            outcome = ["returned", encode(function(*args, **kwargs))]
        except Exception as error:  # noqa: BLE001 - whatever it is, the tests are to see it
            name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
            outcome = ["raised", [name, str(error)[:400]]]
        results.write(dumps(outcome).encode() + b"\n")
        results.flush()
