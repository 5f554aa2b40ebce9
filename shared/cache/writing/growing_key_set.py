"""A set of 16-byte keys that grows one by one at 20 to 60 bytes each, where a Python set of bytes takes more than 100.

Open addressing with linear probing in one bytearray (Knuth, The Art of Computer Programming, vol. 3, 6.4): the keys are
hashes already, so their first 8 bytes choose the slot. The table doubles when it is 80 % full; an empty slot is all
zeros, and the one key that looks so is kept aside.
Cost: a few microseconds per key.
"""

from __future__ import annotations

from shared.keys import KEY_BYTES

_EMPTY = bytes(KEY_BYTES)
_FIRST_SLOTS = 2**12
_MOST_FULL = 0.8


class GrowingKeySet:
    """Holds keys; tells whether one is new as it is added."""

    def __init__(self) -> None:
        """Start empty."""
        self._slots = _FIRST_SLOTS
        self._table = bytearray(self._slots * KEY_BYTES)
        self._count = 0
        self._has_zeros = False

    def __len__(self) -> int:
        return self._count + self._has_zeros

    def add(self, key: bytes) -> bool:
        """Add a key of 16 bytes; return whether it was not there.

        Raises:
            ValueError: it has another length.
        """
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, got {len(key)}")
        if key == _EMPTY:
            new, self._has_zeros = not self._has_zeros, True
            return new
        if self._count >= _MOST_FULL * self._slots:
            self._grow()
        new = self._place(key)
        self._count += new
        return new

    def _place(self, key: bytes) -> bool:
        table, mask = self._table, self._slots - 1
        slot = int.from_bytes(key[:8], "little") & mask
        while True:
            at = slot * KEY_BYTES
            found = table[at : at + KEY_BYTES]
            if found == _EMPTY:
                table[at : at + KEY_BYTES] = key
                return True
            if found == key:
                return False
            slot = (slot + 1) & mask

    def _grow(self) -> None:
        old = self._table
        self._slots *= 2
        self._table = bytearray(self._slots * KEY_BYTES)
        for at in range(0, len(old), KEY_BYTES):
            key = bytes(old[at : at + KEY_BYTES])
            if key != _EMPTY:
                self._place(key)
