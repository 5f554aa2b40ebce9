"""From an answer in prose, fences and code to one program that defines the function that was asked for.

Rules, by regular expression only (an answer is never parsed in this process, since hostile source can crash a parser):
1. The code is the first fenced block that defines the function, else the first fenced block, else the whole answer. A
   fence that an answer's length cut off counts to its end.
2. Code that defines the function runs after the prompt's own preamble (its imports and helpers), which it may define
again.
3. Other code continues the prompt; it ends at the first line that stands at the margin, and is indented where the model
   left the indentation out.
"""

from __future__ import annotations

import re
import textwrap

_FENCE = re.compile(r"^[ \t]*```[ \t]*(?:[\w+.-]+[ \t]*)?\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)

_FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import[ \t]+[\w, \t]+\n", re.MULTILINE)


def preamble_of(prompt: str, entry_point: str) -> str:
    r"""Return what a prompt has before the function that it asks for: its imports and helpers.

    >>> preamble_of("import math\n\n@cached\ndef f(x):\n", "f")
    'import math\n\n'
    """
    last = list(_definition(entry_point).finditer(prompt))
    return re.sub(r"(?:^[ \t]*@.*\n)+\Z", "", prompt[: last[-1].start()], flags=re.MULTILINE) if last else ""


def program_of(prompt: str, answer: str, entry_point: str) -> str:
    """Return source that defines `entry_point` if the answer contains it at all."""
    definition = _definition(entry_point)
    answer = answer.replace("\r\n", "\n")
    blocks = [match.group(1) for match in _FENCE.finditer(answer)]
    defining = [block for block in blocks if definition.search(block)]
    code = defining[0] if defining else blocks[0] if blocks else answer
    found = definition.search(code)
    if found is None:
        return prompt + _body(code)
    whole = _whole_functions(textwrap.dedent(code), bool(blocks))
    futures = _FUTURE.findall(whole)  # Python wants them before the preamble
    return "".join(futures) + f"{preamble_of(prompt, entry_point)}\n{_FUTURE.sub('', whole)}"


def _definition(entry_point: str) -> re.Pattern[str]:
    return re.compile(rf"^[ \t]*(?:async[ \t]+)?def[ \t]+{re.escape(entry_point)}[ \t]*\(", re.MULTILINE)


def _body(code: str) -> str:
    """Return the function's body: indented lines up to the first that stands at the margin."""
    lines = code.lstrip("\n").split("\n")
    if lines[0][:1].strip():
        rest = [line for line in lines[1:] if line.strip()]
        if rest and all(line.startswith("    ") for line in rest):
            lines[0] = "    " + lines[0]  # only the first line's indentation was lost, as when an answer is stripped
        else:
            lines = textwrap.indent(code.lstrip("\n"), "    ").split("\n")
    kept = []
    for line in lines:
        if line[:1].strip():
            break
        kept.append(line)
    return "\n".join(kept) + "\n"


def _whole_functions(code: str, fenced: bool) -> str:
    """Return fenced code as it is; of unfenced code what looks like code, without prose at the margin around it."""
    if fenced:
        return code
    lines = code.split("\n")
    kept: list[str] = []
    for line in lines:
        at_margin = bool(line[:1].strip())
        if at_margin and not re.match(
            r"(?:async |def |class |import |from |@|#|\)|[\w.\[\]]+\s*(?::[^=]+)?=[^=])", line
        ):
            if any(kept_line.lstrip().startswith(("def ", "async ")) for kept_line in kept):
                break
            continue
        kept.append(line)
    return "\n".join(kept) + "\n"
