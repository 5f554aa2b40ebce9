"""Committed parts of one cache as parts of another: linked, copied, or written again without some rows.

A commit record holds nothing about its part's name but the name, so a part keeps its bytes under another one. Each file
is compared with its checksum before its record is written. Cost: one read of each byte; memory: one part where rows are
left out.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from shared.atomic import fill_exclusive, fsync_dir, write_atomic
from shared.cache.layout import Layer
from shared.cache.writing.layer_writer import part_table
from shared.errors import CacheError, DamagedError, refused
from shared.parts.cache_files import hash_file, open_regular, read_json
from shared.parts.mapped_part import MappedBlobs, MappedSequences
from shared.parts.part_file import with_part_file
from shared.parts.part_stats import sequences_stats, targets_stats
from shared.parts.parts import check_file, commit_part
from shared.parts.records import PartRecord, kind_of, read_record, sealed_json
from shared.parts.sequences import SequenceRow, rows_to_table
from shared.schema import TARGETS

_CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_COPY_BYTES = 2**20


@dataclass(slots=True)
class TakeOver:
    """Links or copies parts, and counts."""

    copy: bool
    """Never link."""
    linked: int = 0
    copied: int = 0
    rewritten: int = 0

    def part(self, directory: Path, record: PartRecord, target_dir: Path, stem: str) -> None:
        """Commit a part of `directory` as `stem` of `target_dir`; one that is committed there already is compared and
        left.

        Raises:
            DamagedError: a file is not what its record says.
            CacheError: the disk is full or the directory cannot be written.
        """
        final, record_path = target_dir / f"{stem}.arrow", target_dir / f"{stem}.json"
        if record_path.exists():
            if read_record(record_path).xxh3 != record.xxh3:
                raise DamagedError(
                    f"{record_path} is the record of another part; delete {target_dir.parent} and merge again"
                )
            return
        what = kind_of(target_dir)
        if self.copy or not self._link(directory, record, final):
            self._copy(directory, record, final, what)
        document = {**read_json(directory / f"{record.stem}.json"), "stem": stem}
        write_atomic(record_path, sealed_json(document), f"{what}_record")

    def _link(self, directory: Path, record: PartRecord, final: Path) -> bool:
        """Link a part after comparing it with its checksum; False where the file system cannot."""
        check_file(directory, record)

        def link(file: Path) -> bool:
            """Give the file a second name; False where that cannot be here."""
            try:
                os.link(file, final)
            except FileExistsError:
                _check_left_over(final, record)
            except OSError as error:
                if error.errno in _CANNOT_LINK:
                    return False
                if error.errno == errno.ENOENT and not file.exists():
                    raise DamagedError(f"{file} is not there and its record is; restore it from a copy") from None
                raise CacheError(f"{final} cannot be created: {refused(error)}") from None
            return True

        if not with_part_file(directory, record, link):
            return False
        fsync_dir(final.parent)
        self.linked += 1
        return True

    def _copy(self, directory: Path, record: PartRecord, final: Path, what: str) -> None:
        """Copy a part; the copy gets its name once its bytes have the record's checksum."""

        def copy(file: Path) -> bool:
            """Copy the file; False where the copy is there already."""

            def fill(target: BinaryIO) -> None:
                """Copy the part's bytes, compared with its record once all are there."""
                digest = xxhash.xxh3_128()
                with open_regular(file) as source:
                    while piece := source.read(_COPY_BYTES):
                        digest.update(piece)
                        target.write(piece)
                if (digest.hexdigest(), target.tell()) != (record.xxh3, record.bytes):
                    raise DamagedError(
                        f"{file} is not what its record says; it was truncated or altered: restore it from a copy"
                    )

            return fill_exclusive(final, fill, what, record.bytes)

        if not with_part_file(directory, record, copy):
            _check_left_over(final, record)
        self.copied += 1


def _check_left_over(final: Path, record: PartRecord) -> None:
    """Compare a file that a killed merge left without its record."""
    if hash_file(final) != (record.xxh3, record.bytes):
        raise DamagedError(
            f"{final} is not what a merge of these caches left; delete {final.parent.parent} and merge again"
        )


def rewrite_part(
    directory: Path,
    record: PartRecord,
    kept: NDArray[np.bool_],
    target_dir: Path,
    stem: str,
    layers: Sequence[tuple[Layer, PartRecord, Path]],
) -> None:
    """Commit the rows `kept` of a sequences part, and of its targets, as `stem` of another cache; blobs stay byte for
    byte what they were. `layers` are each layer, the record of its part and its directory there.

    Raises:
        DamagedError: the part is not what was committed.
        CacheError: the disk is full or the directory cannot be written.
    """
    part = MappedSequences(directory, record, verify=True)
    chosen = np.flatnonzero(kept).tolist()
    rows = [part.row(i) for i in chosen]
    commit_part(target_dir, stem, rows_to_table(rows), sequences_stats(rows), record.software, record.set_aside)
    for layer, targets, layer_dir in layers:
        _rewrite_targets(layer, targets, chosen, rows, layer_dir, stem)


def _rewrite_targets(
    layer: Layer, record: PartRecord, chosen: Sequence[int], rows: Sequence[SequenceRow], target_dir: Path, stem: str
) -> None:
    part = MappedBlobs(layer.directory, record, verify=True)
    codec = layer.identity.make_codec()
    blobs = [bytes(part.blob(i, row)) for i, row in zip(chosen, rows, strict=True)]
    nll = [float(part.teacher_nll_nats[i]) for i in chosen]
    table = part_table(TARGETS, [row.key for row in rows], [row.num_positions for row in rows], nll, blobs)
    decoded = (part.content(i, row, codec.decode) for i, row in zip(chosen, rows, strict=True))
    stats = targets_stats(decoded, sum(map(len, blobs)))
    commit_part(target_dir, stem, table, stats, record.software, ())
