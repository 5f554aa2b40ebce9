"""Is a text in another encoding than UTF-8? Its first bytes tell, where it says so itself. Cost: none."""

from __future__ import annotations

_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""Byte order marks, longest first."""


def other_encoding(start: bytes) -> str | None:
    """Say in a sentence that a text which starts like this is not UTF-8, and how it becomes so; None where it may be.

    >>> other_encoding("a".encode("utf-16-le"))
    >>> other_encoding("a".encode("utf-16"))
    'the file is UTF-16 and is read as UTF-8; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW'
    """
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            return f"the file is {name} and is read as UTF-8; convert it: iconv -f {name} -t UTF-8 OLD > NEW"
    return None
