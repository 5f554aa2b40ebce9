"""`decant plan --calibrate`: hours, gigabytes, GPU memory and money of phase 1, extrapolated from a short real build.

Seconds of one engine: start + for each pass a fixed time + tokens / rate. With several engines
(`teacher.workers.count`) the tokens divide, start and fixed times do not. Tokens, positions and bytes are the sample's
means per source times the rows to do.
GPU memory is arithmetic: weights, key-value cache, and log-probability buffers that an engine's own profiling does not
see.
"""

from __future__ import annotations

from typing import Any

from shared.progress import duration
from shared.recipe.recipe import Recipe
from teacher_cache.calibration import Calibration
from teacher_cache.engines.vllm.vllm_settings import (
    SEQUENCES_IN_CACHE,
    cache_bytes_per_token,
    logprob_bytes,
    number_bytes,
)
from teacher_cache.teacher.model_files import resolve_model
from tools.cache.cache_commands import size


def calibrated_figures(
    recipe: Recipe, planned: dict[str, Any], found: Calibration, price_per_hour: float | None
) -> dict[str, Any]:
    """Return what phase 1 of a recipe will take that was planned so, after a sample of it.

    `price_per_hour` is that of one engine (all GPUs of its tensor-parallel group); None leaves money out.
    """
    work = _work(recipe, planned, found)
    assert recipe.teacher is not None
    engines = recipe.teacher.workers.count if recipe.teacher.workers else max(len(recipe.teacher.servers), 1)
    seconds = {"start": found.start_seconds if work["score_tokens"] or work["generate_tokens"] else 0.0}
    seconds["generate"] = found.generate.seconds(work["generate_tokens"] / engines) if found.generate else 0.0
    seconds["score"] = found.score.seconds(work["score_tokens"] / engines)
    hours = sum(seconds.values()) / 3600
    bytes_ = {
        "targets": round(work["target_positions"] * found.target_bytes_per_position),
        "sequences": round(work["sequence_tokens"] * found.sequence_bytes_per_token),
        "records": round(work["parts"] * found.record_bytes_per_part),
    }
    return {
        "sample_rows": found.rows,
        "sample_seconds": found.seconds,
        "rates": {
            "generate_tokens_per_second": found.generate.tokens_per_second if found.generate else None,
            "score_tokens_per_second": found.score.tokens_per_second,
            "generate_fixed_seconds": found.generate.fixed_seconds if found.generate else None,
            "score_fixed_seconds": found.score.fixed_seconds,
            "start_seconds": found.start_seconds,
        },
        "tokens_per_answer": sum(found.positions_by_source.values()) / max(sum(found.rows_by_source.values()), 1),
        "bytes_per_position": found.target_bytes_per_position,
        "mean_support": found.mean_support,
        **work,
        "engines": engines,
        "seconds": {**seconds, "all": hours * 3600},
        "hours": hours,
        "engine_hours": hours * engines,
        "bytes": {**bytes_, "all": sum(bytes_.values())},
        "gpu_memory": _gpu_memory(recipe, found),
        "price_per_hour": price_per_hour,
        "money": None if price_per_hour is None else hours * engines * price_per_hour,
    }


def _work(recipe: Recipe, planned: dict[str, Any], found: Calibration) -> dict[str, int]:
    """Return rows, tokens and positions that are still to be done, by the sample's means per source."""
    rows = generate = score = positions = 0
    for name, source in planned["sources"].items():
        to_do = source["rows"] - source["rows_in_cache"]
        rows += to_do
        if recipe.generate is None:
            answers = source["answer_tokens"]["expected"]
            whole = source["prompt_tokens"] + answers
        else:
            answers, whole = (round(to_do * mean) for mean in _means(found, name))
            generate += answers
        positions += answers
        score += whole
    again = planned.get("rescore", {"tokens": 0, "positions": 0})
    cached_parts = -(-planned["cache"]["rows"] // recipe.rows_per_part) if again["tokens"] else 0
    return {
        "rows": rows,
        "generate_tokens": generate,
        "score_tokens": score + again["tokens"],
        "sequence_tokens": score,
        "target_positions": positions + again["positions"],
        "parts": -(-rows // recipe.rows_per_part) + cached_parts,
    }


def _means(found: Calibration, source: str) -> tuple[float, float]:
    """Return positions and tokens per row of a source; of the whole sample where it has no row of it."""
    rows = found.rows_by_source.get(source, 0)
    if rows:
        return found.positions_by_source[source] / rows, found.tokens_by_source[source] / rows
    total = max(sum(found.rows_by_source.values()), 1)
    return sum(found.positions_by_source.values()) / total, sum(found.tokens_by_source.values()) / total


def _gpu_memory(recipe: Recipe, found: Calibration) -> dict[str, Any]:
    """Return bytes per GPU of the teacher's weights, key-value cache and log-probability buffers."""
    teacher = recipe.teacher
    assert teacher is not None
    files = resolve_model(teacher.model, teacher.revision)
    dtype = files.dtype_as(teacher.dtype)
    length = teacher.max_model_len or files.max_position_embeddings
    shards = teacher.tensor_parallel_size
    stored = sum(path.stat().st_size for path in files.directory.glob("*.safetensors"))
    weights = stored * number_bytes(dtype) / number_bytes(files.dtype) / shards
    cache = SEQUENCES_IN_CACHE * length * cache_bytes_per_token(files.text_config, dtype) / shards
    buffers = logprob_bytes(files.vocab_size, teacher.max_num_batched_tokens)
    return {
        "weights": round(weights),
        "key_value_cache": round(cache),
        "logprob_buffers": buffers,
        "all": round(weights + cache + buffers),
        "sequences_in_cache": SEQUENCES_IN_CACHE,
        "max_model_len": length,
        "measured_on": str(found.provenance.get("device", "unknown")),
    }


def calibrated_text(figures: dict[str, Any]) -> str:
    """Lay the figures out for people."""
    rates, seconds, bytes_ = figures["rates"], figures["seconds"], figures["bytes"]
    lines = [
        f"  calibrated on {figures['sample_rows']:,} rows in {figures['sample_seconds']:,.1f} s, real engine, real "
        "prompts"
    ]
    if rates["generate_tokens_per_second"]:
        fixed = f"and {rates['generate_fixed_seconds']:,.1f} s to fill and empty the engine"
        lines.append(f"    generate {rates['generate_tokens_per_second']:,.0f} tokens/s {fixed}")
        lines.append(f"    answers  {figures['tokens_per_answer']:,.1f} tokens on average")
    lines.append(
        f"    score    {rates['score_tokens_per_second']:,.0f} tokens/s and {rates['score_fixed_seconds']:,.1f} s"
    )
    lines.append(f"    start    {rates['start_seconds']:,.1f} s")
    lines.append(
        f"    targets  {figures['bytes_per_position']:,.1f} bytes per position, {figures['mean_support']:,.1f} entries"
    )
    lines.append(
        f"  whole job, {figures['rows']:,} rows to do, {figures['score_tokens']:,} tokens to score, "
        f"{figures['engines']:,} engines:"
    )
    parts = ", ".join(f"{name} {seconds[name]:,.0f}" for name in ("start", "generate", "score"))
    lines.append(
        f"    time     {duration(seconds['all'])} (seconds: {parts}), {figures['engine_hours']:,.3g} engine-hours"
    )
    lines.append(
        f"    disk     {size(bytes_['all'])} (targets {size(bytes_['targets'])}, sequences {size(bytes_['sequences'])})"
    )
    memory = figures["gpu_memory"]
    told = {name: size(memory[name]) for name in ("all", "weights", "key_value_cache", "logprob_buffers")}
    cached = f"{memory['sequences_in_cache']} sequences of {memory['max_model_len']:,} tokens {told['key_value_cache']}"
    detail = f"weights {told['weights']}, {cached}"
    where = "; measured on a CPU, so arithmetic only" if memory["measured_on"] == "cpu" else ""
    lines.append(f"    GPU      {told['all']} each ({detail}, log-probabilities {told['logprob_buffers']}){where}")
    if figures["money"] is not None:
        lines.append(f"    money    {figures['money']:,.2f} at {figures['price_per_hour']:g} per engine and hour")
    return "\n".join(lines)
