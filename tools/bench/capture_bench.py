"""What the front end costs when vLLM's scored rows become targets: positions per second and core, at k = 64.

Rows are synthetic (as in codec_bench) and shaped as the engine core sends them, one request of 512 tokens at a time.
Each path runs the code that runs in production, from the engine core's tensors to `SparseTargets`: arrays (ours),
vLLM's flat lists, vLLM's dicts (the last two only where vLLM is installed). The model's forward pass is not part of it.
Speed is CPU time of one thread, best of three.

Shape letters: T tokens of a row, W columns.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.payload.targets import SparseTargets
from shared.recipe.sections.capture import Capture, TopCapture, TopSampleCapture
from teacher_cache.engines.columns.column_layout import NOTHING, ColumnLayout
from teacher_cache.engines.columns.sparse_columns import predicting_rows, targets_from_plugin, targets_from_stock
from teacher_cache.engines.vllm.vllm_arrays import PromptArrays, columns_of
from tools.bench import synthetic_teacher

ROW_TOKENS = 512
K = 64
SPANS = np.array([[1, ROW_TOKENS]], dtype=np.int32)
CAPTURES: dict[str, Capture] = {
    "arrays": TopCapture(k=K),
    "arrays_mass_0.999": TopCapture(k=K, mass=0.999),
    "arrays_three_tails_8_draws": TopSampleCapture(mode="top+sample", k=K, draws=8, temperatures=(1.0, 2.0, 4.0)),
}
Row = tuple[NDArray[np.int32], NDArray[np.float32]]


def run(num_rows: int = 64) -> dict[str, Any]:
    """Measure every path.

    Returns:
        Per path: positions_per_second; per list path also bytes_per_position of the containers that vLLM hands over.
    """
    result: dict[str, Any] = {}
    for name, capture in CAPTURES.items():
        layout = ColumnLayout.of(capture, synthetic_teacher.VOCAB_SIZE)
        rows = [plugin_row(layout, seed) for seed in range(num_rows)]

        def plugin(layout: ColumnLayout = layout, rows: list[Row] = rows) -> list[SparseTargets]:
            return [from_arrays(row, layout) for row in rows]

        result[name] = {"positions_per_second": speed(plugin, num_rows)}
    layout = ColumnLayout.of(TopCapture(k=K, mass=0.999), synthetic_teacher.VOCAB_SIZE)
    full = ColumnLayout.of(TopCapture(k=K), layout.vocab_size)
    stock = [
        (ids[:, : 1 + K], values[:, : 1 + K]) for ids, values in (plugin_row(full, seed) for seed in range(num_rows))
    ]
    rows_of = predicting_rows(SPANS)

    def without_plugin() -> list[SparseTargets]:
        return [targets_from_stock(ids[rows_of], values[rows_of], layout) for ids, values in stock]

    result["arrays_without_plugin_mass_0.999"] = {"positions_per_second": speed(without_plugin, num_rows)}
    if importlib.util.find_spec("vllm") is not None:
        result |= list_paths(num_rows)
    return result


def plugin_row(layout: ColumnLayout, seed: int) -> Row:
    """Return [T - 1, W] ids and values as the tail plug-in fills them."""
    targets = synthetic_teacher.make_targets(ROW_TOKENS - 1, K, seed, layout.temperatures)
    rng = np.random.default_rng(seed)
    ids = np.full((ROW_TOKENS - 1, 1 + layout.num_extra), NOTHING, dtype=np.int32)
    values = np.zeros(ids.shape, dtype=np.float32)
    ids[:, 0] = rng.integers(0, layout.vocab_size, ROW_TOKENS - 1)
    values[:, 0] = targets.label_logprobs
    head = targets.logprobs.reshape(-1, K)
    keep = np.exp(head).cumsum(1) - np.exp(head) < layout.mass if layout.mass < 1.0 else np.ones(head.shape, dtype=bool)
    ids[:, 1 : 1 + K] = np.where(keep, targets.ids.reshape(-1, K), NOTHING)
    values[:, 1 : 1 + K] = np.where(keep, head, -np.inf)
    ids[:, layout.tail_start : layout.draw_start] = list(layout.sentinels)
    values[:, layout.tail_start : layout.draw_start] = targets.tail_logmass
    ids[:, layout.draw_start :] = rng.integers(0, layout.vocab_size, ids[:, layout.draw_start :].shape)
    return ids, values


def from_arrays(row: Row, layout: ColumnLayout) -> SparseTargets:
    """Do what the front end does with a request's tensors: copy, look up, convert."""
    kept = PromptArrays(row[0].astype(np.int32), row[1].astype(np.float32))
    return convert(*columns_of(kept, 1 + layout.num_extra), layout)


def convert(ids: NDArray[np.int32], values: NDArray[np.float32], layout: ColumnLayout) -> SparseTargets:
    """Turn a request's columns into targets."""
    rows = predicting_rows(SPANS)
    return targets_from_plugin(ids[rows], values[rows], layout)


def list_paths(num_rows: int) -> dict[str, Any]:
    """Measure vLLM's own containers, filled by its own code, and read into the same targets."""
    import torch
    from vllm.logprobs import create_prompt_logprobs
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsTensors

    layout = ColumnLayout.of(TopCapture(k=K), synthetic_teacher.VOCAB_SIZE)
    few = max(1, num_rows // 16)
    tensors = [
        LogprobsTensors(*map(torch.from_numpy, plugin_row(layout, seed)), torch.zeros(ROW_TOKENS - 1))
        for seed in range(few)
    ]

    def containers(flat: bool) -> list[Any]:
        found = []
        for row in tensors:
            processor = LogprobsProcessor(None, None, create_prompt_logprobs(flat), None, None, layout.num_extra)
            processor._update_prompt_logprobs(row)
            found.append(processor.pop_prompt_logprobs())
        return found

    def flat_lists() -> list[SparseTargets]:
        return [convert(*columns_of(found, 1 + layout.num_extra), layout) for found in containers(flat=True)]

    def dicts() -> list[SparseTargets]:
        return [convert(*columns_of_dicts(found, 1 + layout.num_extra), layout) for found in containers(flat=False)]

    def size(found: list[Any]) -> float:
        return sum(map(deep_bytes, found)) / (few * (ROW_TOKENS - 1))

    return {
        "flat_lists": {
            "positions_per_second": speed(flat_lists, few),
            "bytes_per_position": size(containers(flat=True)),
        },
        "dicts": {"positions_per_second": speed(dicts, few), "bytes_per_position": size(containers(flat=False))},
    }


def columns_of_dicts(found: Any, num_columns: int) -> Row:
    """Read vLLM's list of dicts; a label inside the head appears once there and is put first again."""
    ids = np.full((len(found) - 1, num_columns), NOTHING, dtype=np.int32)
    values = np.zeros(ids.shape, dtype=np.float32)
    for row, position in enumerate(found[1:]):
        entries = list(position.items())
        if len(entries) < num_columns:
            entries[1:] = sorted(entries, key=lambda entry: entry[1].rank)
        ids[row] = [token for token, _ in entries]
        values[row] = [entry.logprob for _, entry in entries]
    return ids, values


def deep_bytes(container: Any) -> int:
    """Return bytes of a container and what it alone holds, small integers and shared objects counted once."""
    seen: set[int] = set()
    waiting, total = [container], 0
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        total += sys.getsizeof(item)
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
        elif hasattr(item, "__dict__"):
            waiting.append(vars(item))
        elif hasattr(item, "__slots__"):
            waiting += [getattr(item, name) for name in item.__slots__]
    return total


def speed(work: Callable[[], Any], num_rows: int) -> float:
    """Return positions per second of CPU time, best of three."""
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return num_rows * (ROW_TOKENS - 1) / best


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
