"""Statistics of a cache, summed from the records of its parts: no part is opened.

Cost: one small JSON per part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.parts.part_stats import ENTROPY_BIN_NATS, add_figures
from shared.parts.records import PartRecord


def summed_stats(
    sequences: Sequence[PartRecord],
    targets: Sequence[PartRecord],
    states: Sequence[PartRecord] | None,
    hidden_rows: int,
    hidden_positions: int,
) -> dict[str, Any]:
    """Return figures of a cache and, where `targets` is not empty, of one layer.

    Args:
        sequences: records of the parts that are read.
        targets: records of the same parts in the layer.
        states: records of the same parts in the hidden layer; None without one.
        hidden_rows: rows that a second build repeated and a reader does not show; the sums over positions include them.
        hidden_positions: their positions.

    Returns:
        rows, positions, tokens, bytes, sources, set_aside (count by reason); with a layer also bytes_per_position,
        mean_support, mean_entropy_nats, mean_tail_mass, mean_label_nll_nats and both histograms; of a layer in another
        tokenizer share_with_head, and placed_mass and teacher_mass, the mean mass of heads now and before; with a
        hidden layer hidden_bytes and hidden_bytes_per_position.
    """
    total: dict[str, Any] = {"rows": 0, "positions": 0, "tokens": 0, "sources": {}, "finish_reasons": {}}
    reasons: dict[str, int] = {}
    for record in sequences:
        add_figures(total, record.stats)
        for item in record.set_aside:
            reason = str(item.get("reason", "unknown"))
            reasons[reason] = reasons.get(reason, 0) + 1
    stored_positions = total["positions"]
    result = {
        "rows": total["rows"] - hidden_rows,
        "positions": stored_positions - hidden_positions,
        "hidden_rows": hidden_rows,
        "tokens": total["tokens"],
        "parts": len(sequences),
        "sequences_bytes": sum(record.bytes for record in sequences),
        "sources": total["sources"],
        "finish_reasons": total["finish_reasons"],
        "set_aside": reasons,
    }
    if targets:
        result |= _layer_stats(targets)
    if states is not None:
        result["hidden_bytes"] = sum(record.bytes for record in states)
        positions = sum(record.positions for record in states)
        result["hidden_bytes_per_position"] = result["hidden_bytes"] / max(positions, 1)
    return result


def _layer_stats(targets: Sequence[PartRecord]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for record in targets:
        add_figures(total, record.stats)
    positions = max(total["positions"], 1)
    with_head = total["positions"] - total["support_histogram"][0]
    derived = {}
    if total.get("teacher_mass_sum"):  # a layer in another tokenizer
        derived = {
            "share_with_head": with_head / positions,
            "placed_mass": total["placed_mass_sum"] / max(with_head, 1),
            "teacher_mass": total["teacher_mass_sum"] / max(with_head, 1),
        }
    labels = max(total["positions"] - total["impossible_labels"], 1)
    targets_bytes = sum(record.bytes for record in targets)
    return {
        "targets_bytes": targets_bytes,
        "blob_bytes": total["blob_bytes"],
        "bytes_per_position": targets_bytes / positions,
        "mean_support": total["support_sum"] / positions,
        "mean_entropy_nats": total["entropy_nats_sum"] / positions,
        "mean_tail_mass": total["tail_mass_sum"] / positions,
        "mean_label_nll_nats": total["label_nll_nats_sum"] / labels,
        "impossible_labels": total["impossible_labels"],
        "entropy_bin_nats": ENTROPY_BIN_NATS,
        "entropy_histogram": total["entropy_histogram"],
        "support_histogram": total["support_histogram"],
        **derived,
    }
