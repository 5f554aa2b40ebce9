"""Chat templates of strangers, rendered within bounds: a template is a program, and some never end or fill the memory.

Jinja's sandbox keeps a template from files and objects, not from loops within loops, powers of ten or a text times a
billion, and what runs in C cannot be broken off from inside. So whatever is rendered first of its kind (of a number of
turns, with tools or without) is rendered in a forked process before, whose processor time and memory the system bounds;
each rendering after that is broken off by a watch, as far as loops go. Cost: 20 ms for each of a few kinds, a
microsecond for each rendering.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.errors import ModelError

SECONDS = 10
"""Of one rendering; it takes a millisecond."""
MEMORY_BYTES = 2**29
"""Beside what the process has; a rendering takes a few times its text."""
MOST_CHARACTERS = 2**26
"""Of a rendered text."""
_MOST_TURNS = 6
"""Conversations of so many turns or more are one kind."""
_WALL_SECONDS = 6 * SECONDS
"""Of the forked process; one that has not ended by then waits for the machine or for a lock, not for the template."""
_ENDED, _NO_MEMORY = 0, 3

_tried: set[tuple[str, int, bool]] = set()


class _EndlessError(BaseException):
    """Breaks a rendering off; no `Exception`, which a library would take for one of the template's own."""


def render(tokenizer: Any, turns: Sequence[Any], origin: str, **settings: Any) -> str:
    """Return what `tokenizer.apply_chat_template(turns, tokenize=False, ...)` renders.

    Args:
        tokenizer: of transformers.
        turns: a conversation.
        origin: how messages call the template.
        settings: more arguments of `apply_chat_template`.

    Raises:
        ModelError: it takes more time or memory than any template.
        Exception: whatever the template raises.
    """

    def rendered() -> str:
        """Render the conversation, without bounds."""
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **settings))

    template = settings.get("chat_template") or getattr(tokenizer, "chat_template", None)
    kind = (str(template), min(len(turns), _MOST_TURNS), bool(settings.get("tools")))
    if kind not in _tried:
        broken = _tried_apart(rendered)
        if broken:
            raise ModelError(_sentence(origin, broken))
        _tried.add(kind)
    try:
        with _WATCH.at_most(SECONDS):
            text = rendered()
    except _EndlessError:
        raise ModelError(_sentence(origin, f"{SECONDS} seconds")) from None
    if len(text) > MOST_CHARACTERS:
        raise ModelError(_sentence(origin, f"{MOST_CHARACTERS:,} characters"))
    return text


def _sentence(origin: str, broken: str) -> str:
    return f"{origin} takes more than {broken} to render one conversation; name another template in `chat_template`"


def _tried_apart(rendered: Callable[[], str]) -> str:
    """Render in a process of its own; return which bound it broke, empty where none or where there was no trial."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other threads: a lock of theirs makes the child wait, and is no fault
            pid = os.fork()
    except OSError:  # no room for another process
        return ""
    if pid == 0:
        _be_tried(rendered)
    deadline, pause = time.monotonic() + _WALL_SECONDS, 0.0005
    found = status = 0
    try:
        while not found and time.monotonic() < deadline:
            found, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.0 if found else pause)
            pause = min(0.05, 1.5 * pause)
    finally:
        if not found:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        return f"{SECONDS} seconds"
    return "" if not found or code == _ENDED else f"{MEMORY_BYTES // 2**20} MiB"


def _be_tried(rendered: Callable[[], str]) -> None:
    """Be the forked process: render, and end without a word."""
    code = _ENDED
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        _lower(resource.RLIMIT_CPU, SECONDS)
        _lower(resource.RLIMIT_CORE, 0)
        with contextlib.suppress(OSError, ValueError):  # where the system does not say
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY_BYTES)
        _end_where_constants_fill_memory()
        rendered()
    except MemoryError:
        code = _NO_MEMORY
    except BaseException:  # noqa: BLE001 - of the template, which raises it again where somebody listens
        code = _ENDED
    finally:
        os._exit(code)


def _end_where_constants_fill_memory() -> None:
    """Let this process end where Jinja computes a constant that does not fit: it would go on without, and ours would
    compute it, also in a branch that is never taken.
    """
    from jinja2 import nodes

    def minding(as_const: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap how a node computes its constant."""

        def minded(*args: Any, **named: Any) -> Any:
            try:
                return as_const(*args, **named)
            except nodes.Impossible as error:
                if isinstance(error.__cause__, MemoryError):
                    os._exit(_NO_MEMORY)
                raise

        return minded

    for kind in list(vars(nodes).values()):
        if isinstance(kind, type) and "as_const" in vars(kind):
            kind.as_const = minding(kind.as_const)  # type: ignore[attr-defined]


def _lower(limit: int, most: int) -> None:
    hard = resource.getrlimit(limit)[1]
    soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(limit, (soft, hard))


class _Watch:
    """Raises in threads that take too long. Cost: a thread that wakes twice a second while something is rendered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def at_most(self, seconds: float) -> Iterator[None]:
        """Break the body off where it takes longer, with `_EndlessError`, once it is back in Python."""
        me = threading.get_ident()
        with self._lock:
            self._due[me] = time.monotonic() + seconds
            if self._thread is None or not self._thread.is_alive():  # of a process that was forked, too
                self._thread = threading.Thread(target=self._look, name="decant-templates", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._due.pop(me, None)

    def _look(self) -> None:
        while True:
            time.sleep(0.5)
            with self._lock:
                now = time.monotonic()
                for thread, due in list(self._due.items()):
                    if due < now:
                        del self._due[thread]
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(thread), ctypes.py_object(_EndlessError)
                        )


_WATCH = _Watch()
