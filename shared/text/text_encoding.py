"""Is a text in another encoding than UTF-8? Its first bytes tell, or bytes that UTF-8 does not have.

Cost: one pass over texts that are not ASCII.
"""

from __future__ import annotations

import re

_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""Byte order marks, longest first."""
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` puts in place of bytes that are not UTF-8."""


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


def not_utf8(text: str) -> str | None:
    r"""Say which byte of a text that was read with `surrogateescape` is not UTF-8, and how its file becomes so; None
    where all of it is.

    >>> not_utf8("caf\u00e9")
    >>> not_utf8(b"a caf\xe9".decode("utf-8", "surrogateescape"))
    "is not UTF-8 (byte 0xe9 after 'a caf'); convert the file: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW, say"
    """
    found = None if text.isascii() else _NOT_UTF8.search(text)
    if found is None:
        return None
    before = text[max(found.start() - 20, 0) : found.start()]
    return (
        f"is not UTF-8 (byte {ord(found[0]) - 0xDC00:#x} after {before!r}); convert the file: "
        "iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW, say"
    )
