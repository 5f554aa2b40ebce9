"""How close a model is to the teacher on prompts that no stage trained on, from the cache alone; no teacher is loaded.

Held-out rows are those whose group's hash says so, capped to the rows with the smallest group keys, which is a random
sample. A row's tokens go through the model once, rows of similar length together; only the hidden states at
supervised positions meet the head, in chunks. Reported per position: KL in nats from the cached sparse distribution
to the model's on the same k + 1 masses (T = 1), agreement of the two most probable tokens (in all, and by how sure
the teacher is), whether the model's is among the teacher's five, calibration, the exponential of the mean NLL of
labels, and their NLL in bits per byte of the text, which compares models of different tokenizers. Positions without a
head (a layer in another tokenizer) count for perplexity and bits alone.

Cost: one forward pass over the held-out tokens.
Shape letters: R rows of a batch, L longest of them, S supervised positions, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared.cache.cache import Cache
from shared.cache.rows_left_out import rows_left_out
from shared.cache.tokenizer_files import read_tokenizer_files
from shared.errors import CacheError, EvaluationError
from shared.identity.identity import LayerIdentity
from shared.models.forward.attention_choice import faithful_attention
from shared.models.forward.causality import sees_what_follows
from shared.models.forward.row_length import known_positions
from shared.models.forward.wide_weights import widest
from shared.models.no_numbers import NO_NUMBERS
from shared.models.weights.loading import load_causal_lm
from shared.payload.narrowing import LayerView
from shared.recipe.recipe import Recipe
from shared.tokens.token_bytes import Vocabulary, read_vocabulary
from student_train.batch.target_batch import TargetBatch
from student_train.evaluate.heldout_rows import heldout_rows
from student_train.operator.position_scores import PositionScores
from student_train.student.rows_alone import run_rows_alone
from student_train.student.student_head import body_of, check_head, head_of, probe_tokens
from tools.evaluate.heldout.confidence_bins import ConfidenceBins
from tools.evaluate.heldout.heldout_sums import HeldoutSums, RowMeasure
from tools.evaluate.heldout.largest_divergences import LargestDivergences, largest_of_row


def evaluate_heldout(
    model_dir: str | Path,
    caches: Sequence[str | Path],
    fraction: float,
    *,
    recipe: Recipe | None = None,
    targets: str | LayerView | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    adapter: str | None = None,
    as_captured: bool = False,
    several: Mapping[str, str | LayerView | None] | None = None,
    trust_remote_code: bool = False,
    batch_tokens: int = 4096,
    only_job: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure one model on the held-out rows of caches, in float32.

    Args:
        model_dir: of the model.
        caches: whose held-out rows.
        fraction: of prompts that are held out.
        recipe: whose `answers` choose among the rows; None: every row counts, once.
        targets: the layer to compare with; None: the only one.
        max_rows: most rows.
        seed: of the intervals.
        adapter: an adapter's directory on top.
        several: further layers to compare with on the same rows, by the names of their teachers.
        as_captured: it is the teacher: load it in the type that the layer records, as it was when it was captured.
        trust_remote_code: run Python that comes with it.
        batch_tokens: most tokens of a forward pass.
        only_job: first 8 digits of the job whose rows count; None: those of every job.
        say: progress.

    Returns:
        kl_nats, kl_low, kl_high (95 % over rows; None of one row), top1_agreement, top1_in_teacher_top5,
        acceptance_rate (sum of min(p, q) over the head, a lower bound), acceptance_rate_at_most,
        agreement_by_teacher_confidence, calibration_error, calibration, perplexity, teacher_perplexity,
        bits_per_byte (None where the tokenizer's tokens do not stand for bytes), positions, positions_compared, rows,
        rows_too_long, dtype, by_source with the same figures per source, and partings: the positions of the
        largest KL in their context. With `several`, by_layer has the figures against each.

    Raises:
        EvaluationError: no row is held out, or the model cannot be loaded, does not fit the cache's tokenizer, or
            computes NaN.
        CacheError: a cache cannot be read.
    """
    opened = [Cache.open(Path(cache), targets) for cache in caches]
    left_out = rows_left_out(opened, recipe).rows | _of_other_jobs(opened, only_job)
    chosen = heldout_rows(opened, fraction, max_rows, left_out)
    layer = _require_comparable(caches, opened[0].layer, fraction, chosen)
    model = load_model(str(model_dir), adapter, layer.dtype if as_captured else "float32", trust_remote_code)
    check_head(model, head_of(model, layer.vocab_size))
    _check_causal(model, layer.vocab_size, str(model_dir))
    limit = known_positions(model.config.get_text_config()) or math.inf
    fitting = [(cache, row) for cache, row in chosen if opened[cache].num_tokens[row] <= limit]
    if not fitting:
        raise EvaluationError(f"{model_dir}: every held-out row is longer than the {limit} tokens that the model reads")
    sums, largest, row_kl = _measured(model, layer.vocab_size, opened, fitting, batch_tokens, say)
    found: dict[str, Any] = {"rows_too_long": len(chosen) - len(fitting)}
    found |= {"dtype": str(model.dtype).removeprefix("torch."), "layer": opened[0].layer_name, "row_kl": row_kl}
    if as_captured and layer.quantization is not None:
        measured = None if getattr(model, "hf_quantizer", None) is None else layer.quantization
        found["quantization"] = {"captured": layer.quantization, "measured": measured}
    if several:
        other = {name: [Cache.open(Path(cache), one) for cache in caches] for name, one in several.items()}
        found["by_layer"] = {name: _against(model, of, fitting, batch_tokens, seed) for name, of in other.items()}
    return {**found, **sums.figures(seed), "partings": largest.described(model, opened, layer.vocab_size)}


def _of_other_jobs(opened: Sequence[Cache], job: str | None) -> NDArray[np.bool_]:
    """Return [R] which rows of caches another job made than the one of those 8 digits; none where it is None."""
    parts = [(id8, end - start) for cache in opened for id8, start, end in cache.jobs_of_rows()]
    return np.repeat([job is not None and id8 != job for id8, _ in parts], [rows for _, rows in parts])


def _require_comparable(
    caches: Sequence[str | Path], layer: LayerIdentity | None, fraction: float, chosen: Sequence[tuple[int, int]]
) -> LayerIdentity:
    """Return the layer of caches, once there are rows and distributions to compare with."""
    if not chosen:
        listed = ", ".join(str(cache) for cache in caches)
        raise EvaluationError(
            f"{listed}: no row is held out at heldout.fraction {fraction:g}; raise it, or add prompts"
        )
    if layer is None:
        raise EvaluationError(
            f"{caches[0]}: the cache holds no teacher distributions to compare with; run `decant teach` first"
        )
    return layer


def _against(
    model: Any, opened: Sequence[Cache], places: Sequence[tuple[int, int]], batch_tokens: int, seed: int
) -> dict[str, Any]:
    """Return the figures of a model on rows that were measured already, against another teacher's layer."""
    assert opened[0].layer is not None
    sums, _, _ = _measured(model, opened[0].layer.vocab_size, opened, places, batch_tokens, lambda line: None)
    figures = sums.figures(seed)
    kept = ("kl_nats", "kl_low", "kl_high", "top1_agreement", "positions", "rows")
    by_source = {name: {key: part[key] for key in kept} for name, part in figures["by_source"].items()}
    return {**{key: figures[key] for key in kept}, "by_source": by_source}


def _measured(
    model: Any,
    vocab_size: int,
    opened: Sequence[Cache],
    places: Sequence[tuple[int, int]],
    batch_tokens: int,
    say: Callable[[str], None],
) -> tuple[HeldoutSums, LargestDivergences, dict[str, list[float]]]:
    """Measure the rows at `places` (cache, row); the last value is [positions, KL in nats] by row_key."""
    sums, largest, num_done = HeldoutSums(), LargestDivergences(), 0
    row_kl: dict[str, list[float]] = {}
    vocabulary = _vocabulary(opened[0].path)
    for batch in _batches(opened, places, batch_tokens):
        rows = [opened[cache][row] for cache, row in batch]
        for place, row, measure in zip(batch, rows, measure_batch(model, vocab_size, rows, vocabulary), strict=True):
            sums.add(measure)
            row_kl[bytes(row.row_key).hex()] = [measure.compared, measure.kl_nats]
            largest.add(place, measure.largest)
        num_done += len(batch)
        say(f"held-out rows: {num_done} of {len(places)}")
    return sums, largest, row_kl


def load_model(model: str, adapter: str | None, dtype: str, trust_remote_code: bool) -> Any:
    """Load a causal language model for measuring, on the accelerator where there is one.

    Raises:
        EvaluationError: it cannot be loaded.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)} | (
        {"device_map": "auto"} if torch.cuda.is_available() else {}
    )
    loaded = load_causal_lm(model, what="the model", trust_remote_code=trust_remote_code, adapter=adapter, **options)
    loaded.eval()
    probe = torch.zeros(1, 2, dtype=torch.int64, device=loaded.get_input_embeddings().weight.device)
    with torch.no_grad():
        loaded.set_attn_implementation(faithful_attention(loaded, lambda: loaded(input_ids=probe, use_cache=False)))
    return loaded


def _check_causal(model: Any, vocab_size: int, name: str) -> None:
    """Refuse a model that knows the tokens which it is asked to predict.

    Raises:
        EvaluationError: it is not causal.
    """
    body, (width, is_wide) = body_of(model), widest(model)
    with torch.no_grad(), width:
        probe = probe_tokens(model, vocab_size, seed=0)
        if is_wide and sees_what_follows(
            model, lambda rows: body(input_ids=rows, use_cache=False)[0], probe, vocab_size
        ):
            raise EvaluationError(
                f"{name} lets tokens see what comes after them, so what it says of the next one is no prediction; "
                "name a causal language model"
            )


def _vocabulary(cache_dir: Path) -> Vocabulary | None:
    """Return the bytes of a cache's tokens; None of a tokenizer whose tokens do not stand for bytes."""
    tokenizer_json = read_tokenizer_files(cache_dir).get("tokenizer.json", b"")
    try:
        return read_vocabulary(tokenizer_json)
    except CacheError:  # of another kind
        return None


def measure_batch(
    model: Any, vocab_size: int, rows: Sequence[Any], vocabulary: Vocabulary | None = None
) -> list[RowMeasure]:
    """Measure rows of a cache in one forward pass; `vocabulary` counts the bytes of their text.

    Raises:
        EvaluationError: the model computes NaN.
    """
    head, body = head_of(model, vocab_size), body_of(model)
    device = model.get_input_embeddings().weight.device
    token_ids = torch.from_numpy(np.concatenate([row.token_ids for row in rows]).astype(np.int64))[None].to(device)
    positions = torch.cat([torch.arange(len(row.token_ids), device=device) for row in rows])[None]
    first = np.cumsum([0, *(len(row.token_ids) for row in rows)])
    predictors = np.concatenate([row.predictor_index() + start for row, start in zip(rows, first, strict=False)])
    with torch.no_grad():
        states = run_rows_alone(body, token_ids, positions)[0]
    hidden = states[torch.from_numpy(predictors.astype(np.int64)).to(device)]
    labels = torch.from_numpy(np.concatenate([row.labels() for row in rows]).astype(np.int64)).to(device)
    batch = TargetBatch.from_rows([row.targets for row in rows]).to(device)
    scores = head.scores(hidden, labels, batch)
    if bool(scores.kl_nats.isnan().any()):
        raise EvaluationError(NO_NUMBERS)
    ends = np.cumsum([row.num_positions for row in rows])
    starts = ends - [row.num_positions for row in rows]
    compared = batch.has_member.cpu().numpy()
    return [
        _row_measure(row, scores, slice(start, end), compared[start:end], vocabulary)
        for row, start, end in zip(rows, starts, ends, strict=True)
    ]


def _row_measure(
    row: Any, scores: PositionScores, where: slice, compared: np.ndarray, vocabulary: Vocabulary | None
) -> RowMeasure:
    """Sum up the scores of one row's positions."""

    def of_row(scored: torch.Tensor) -> Any:
        return scored[where].double().cpu().numpy()

    equal, kl_nats = of_row(scores.top1_equal).astype(bool), of_row(scores.kl_nats)
    targets = row.targets
    with_head = targets.counts > 0
    teacher_top1 = np.exp(targets.logprobs[targets.offsets()[:-1][with_head]].astype(np.float64))
    return RowMeasure(
        source=row.source,
        positions=row.num_positions,
        compared=int(compared.sum()),
        kl_nats=float(kl_nats.sum()),
        top1_equal=int(equal.sum()),
        top1_in_teacher_top5=int(of_row(scores.top1_in_teacher_top5).sum()),
        label_nll_nats=float(of_row(scores.label_nll_nats).sum()),
        teacher_nll_nats=-float(targets.label_logprobs.sum(dtype=np.float64)),
        calibration=ConfidenceBins.of(np.exp(of_row(scores.top1_logprob)), of_row(scores.top1_is_label).astype(bool)),
        agreement=ConfidenceBins.of(teacher_top1, equal[with_head]),
        acceptance=float(of_row(scores.acceptance).sum()),
        acceptance_at_most=float(of_row(scores.acceptance_at_most)[compared].sum()),
        text_bytes=math.nan if vocabulary is None else vocabulary.num_bytes(row.labels().tolist()),
        largest=largest_of_row(kl_nats),
    )


def _batches(
    caches: Sequence[Cache], rows: Sequence[tuple[int, int]], batch_tokens: int
) -> list[list[tuple[int, int]]]:
    """Group rows of similar length, R x L within `batch_tokens`; longest first: a lack of memory shows at once."""
    ordered = sorted(rows, key=lambda place: (-int(caches[place[0]].num_tokens[place[1]]), place))
    batches: list[list[tuple[int, int]]] = []
    for place in ordered:
        longest = int(caches[batches[-1][0][0]].num_tokens[batches[-1][0][1]]) if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches
