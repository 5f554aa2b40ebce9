"""Columns of both kinds of part, the format's version and every limit that a reader may rely on.

A part is one Arrow IPC file with at most one record batch, uncompressed, so that a reader can map it and use any row
without reading the others. The position rule: entry s of a row's targets describes the distribution that *predicts* the
s-th token of the row's concatenated spans. The whole format is described in docs/format.md.
"""

from __future__ import annotations

import re

import pyarrow as pa

FORMAT_VERSION = 1
"""Version of the directory, of both schemas and of the codec; it grows with every change that an older reader cannot
read.
"""

MAX_TOKENS_PER_ROW = 2**20
MAX_SPANS_PER_ROW = 2**16
MAX_K = 65_535
MAX_DRAWS = 65_535
MAX_TEMPERATURES = 16
MAX_VOCAB_SIZE = 2**24
MAX_ENTRIES_PER_ROW = 2**26
"""Head entries of one row: 512 positions with a head of 131,072, or 1,048,576 positions with 64."""
MAX_TEXT_BYTES_PER_ROW = 2**28
MAX_HIDDEN_BYTES_PER_ROW = 2**31 - 1
"""Hidden states of one row before compression: 8,192 positions of 32 layers of 8,192."""
MAX_HIDDEN_WIDTH = 2**20
MAX_HIDDEN_LAYERS = 1024
MAX_STRONGEST_KEYS = 4096
MAX_ROWS_PER_PART = 65_536
MAX_TOKENS_PER_PART = 2**31 - 1
MAX_JSON_BYTES = 2**26
MAX_JSON_VALUES = 2**22
"""Values of one JSON file: 65,536 rows set aside with 60 facts about each; parsed, a value takes up to 72 bytes."""
MAX_TOKENIZER_FILE_BYTES = 2**28
MAX_PART_BYTES = 2**50
MAX_FRAME_FREE_BYTES = 2**24
MAX_FRAME_RATIO = 256
"""A frame holds at most so many bytes for each of its own, beyond the free ones; real ones hold 1.1 to 20."""
MIN_GAP_STEP = 2.0**-10
MAX_GAP_STEP = 1.0

_KEY = pa.binary(16)

SEQUENCES: pa.Schema = pa.schema(
    [
        pa.field("key", _KEY, nullable=False),
        pa.field("row_key", _KEY, nullable=False),
        pa.field("group_key", _KEY, nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("prompt", pa.large_string(), nullable=False),
        pa.field("response", pa.large_string(), nullable=False),
        pa.field("reference", pa.large_string(), nullable=True),
        pa.field("token_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field(
            "spans",
            pa.list_(pa.field("item", pa.list_(pa.field("item", pa.int32(), nullable=False), 2), nullable=False)),
            nullable=False,
        ),
        pa.field("finish_reason", pa.string(), nullable=False),
    ]
)
"""One row: a prompt with its answer. `spans` are (start, end) pairs, end exclusive, of supervised tokens; start >= 1.
"""

TARGETS: pa.Schema = pa.schema(
    [
        pa.field("key", _KEY, nullable=False),
        pa.field("num_positions", pa.int32(), nullable=False),
        pa.field("teacher_nll_nats", pa.float64(), nullable=False),
        pa.field("blob", pa.large_binary(), nullable=False),
    ]
)
"""One row: the teacher's targets for the same row of the same part of sequences/; `teacher_nll_nats` is summed over its
positions."""

HIDDEN: pa.Schema = pa.schema(
    [
        pa.field("key", _KEY, nullable=False),
        pa.field("num_positions", pa.int32(), nullable=False),
        pa.field("blob", pa.large_binary(), nullable=False),
    ]
)
"""One row: the teacher's hidden states for the same row of the same part of sequences/."""

PLAN: pa.Schema = pa.schema(
    [
        pa.field("group_key", _KEY, nullable=False),
        pa.field("row_key", _KEY, nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt", pa.large_string(), nullable=False),
        pa.field("messages", pa.large_string(), nullable=False),
        pa.field("reference", pa.large_string(), nullable=True),
        pa.field("format", pa.string(), nullable=False),
    ]
)
"""One row of a job's work list; record batch i is unit i."""

FINISH_REASONS = ("stop", "length", "given")

STEM_PATTERN = re.compile(r"part-(?P<id8>[0-9a-f]{8})-(?P<unit>[0-9]{6,9})")
"""Name of a part without its ending: the first 8 digits of its job and the number of its unit."""
JOB_PATTERN = re.compile(r"[0-9a-f]{32}")
LAYER_PATTERN = re.compile(r"(?P<name>[a-z0-9][a-z0-9._+-]{0,62})-(?P<hash8>[0-9a-f]{8})")
LAYER_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._+-]{0,62}")
TOKENIZER_FILE_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,126}(?:/[A-Za-z0-9_][A-Za-z0-9_.+-]{0,126})?")
