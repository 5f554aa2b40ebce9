"""Files as bytes, decompressed by their ending, a bounded piece at a time.

A compressed file is read member by member. One that ends in the middle is refused, and so is what follows a member and
is none: the readers of the standard library take either for the end of the data, and its rows would be lost in silence.
A file from elsewhere may be made to unpack to any size: so little goes in at once that what comes out fits memory (bz2
and xz, which make gigabytes of a kilobyte, are asked for a block at a time), and what comes out may not be out of all
proportion to what went in.
Cost: a call per 2 KiB of a compressed file.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from shared.text.file_endings import ends_in

PIECE_BYTES = 2**11
"""Goes in at once; zstd makes up to 64 MiB of it."""
BLOCK_BYTES = 2**18
MAX_LZMA_BYTES = 2**28
"""Of a decompressor's window; `xz -9` asks for 65 MiB."""
FREE_BYTES = 2**26
MAX_RATIO = 1024
"""A file may unpack to so many bytes for each of its own beyond the free ones; rows of text make 3 to 30."""


def open_bytes(path: Path) -> BinaryIO:
    """Open a file, decompressed by its ending.

    Reading raises EOFError where a compressed file ends in the middle, ValueError where it unpacks out of proportion,
    and what the decompressor raises where it holds something else.
    """
    packed = next((new for ending, new in _NEW.items() if ends_in(path, ending)), None)
    if packed is None:
        return path.open("rb")
    return cast("BinaryIO", io.BufferedReader(_Members(path, packed), BLOCK_BYTES))


def _zstandard() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


_NEW: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(memlimit=MAX_LZMA_BYTES),
    ".zst": _zstandard,
}


class _Members(io.RawIOBase):
    """The members of a compressed file, one after another."""

    def __init__(self, path: Path, new: Callable[[], Any]) -> None:
        self._file = path.open("rb")
        self._new = new
        self._member: Any = None
        """The one that is open; None between two."""
        self._members = 0
        self._packed = b""
        self._ready = memoryview(b"")
        self._bytes_in = self._bytes_out = 0

    def readable(self) -> bool:
        """Say yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with decompressed bytes; 0 at the end."""
        while not self._ready:
            has_more = not getattr(self._member, "needs_input", True)
            if not self._packed and not has_more:
                self._packed = self._file.read(PIECE_BYTES)
                self._bytes_in += len(self._packed)
            if self._member is None and self._members:
                self._packed = self._packed.lstrip(b"\0")  # padding between members
            if not self._packed and not has_more:
                if self._file.peek(1):
                    continue
                if self._member is not None or not self._members:
                    raise EOFError("the compressed file ends in the middle; get it again")
                return 0
            self._unpack()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpack(self) -> None:
        if self._member is None:
            self._member, self._members = self._new(), self._members + 1
        most = (BLOCK_BYTES,) if hasattr(self._member, "needs_input") else ()
        self._ready = memoryview(self._member.decompress(self._packed, *most))
        self._packed = self._member.unused_data if self._member.eof else b""
        self._member = None if self._member.eof else self._member
        self._bytes_out += len(self._ready)
        if self._bytes_out > FREE_BYTES + MAX_RATIO * self._bytes_in:
            raise ValueError(
                f"it unpacks to more than {MAX_RATIO:,} times its size, as no rows do; unpack it by hand if it is meant"
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
