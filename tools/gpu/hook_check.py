"""The hook in vLLM's V2 runner on a real GPU: vLLM's own files for prompt log-probabilities and top-k, at full width.

The two files are loaded from an installed vLLM or from a folder that was brought along; everything else that they
import is stood in for, since nothing of it takes part. Two prompts, one of them begun before, share a batch of more
than 1,024 rows; what comes back is held against float64. Without a GPU Triton interprets the kernels, at tiny sizes.

Shape letters: P rows of the batch, V vocabulary, H width.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from tools.gpu.measuring import device, is_installed

PLACE = "vllm.v1.worker.gpu.sample"
FILES = {f"{PLACE}.prompt_logprob": "prompt_logprob.py", f"{PLACE}.logprob": "logprob.py"}


class _Scores(NamedTuple):
    """Stands in for vLLM's LogprobsTensors."""

    logprob_token_ids: Any
    logprobs: Any
    selected_token_ranks: Any
    cu_num_generated_tokens: Any = None
    cu_num_generated_tokens_tensor: Any = None

    @staticmethod
    def cat(parts: list[Any]) -> Any:
        """Join parts of one prompt."""
        import torch

        return _Scores(*(torch.cat([part[i] for part in parts]) for i in range(3)))


class _StandIn(ModuleType):
    """A module of which every name is a type."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the two files from a folder, and stands in for the rest of vLLM."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Claim vLLM and what is below it."""
        if fullname.split(".")[0] != "vllm":
            return None
        if fullname in FILES:
            return importlib.util.spec_from_file_location(fullname, self._folder / FILES[fullname])
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make a module that has every name."""
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Give it the few names that are used."""
        if module.__name__ == "vllm.triton_utils":
            import triton

            vars(module).update(triton=triton, tl=triton.language)
        vars(module).update(LogprobsTensors=_Scores, MAX_LOGPROB_TOKEN_IDS=128)


def vllm_files(named: Path | None) -> Path | None:
    """Return the folder of the two files: below the named one, or of the installed vLLM; None where there are none."""
    roots = [named] if named is not None else []
    if named is None and (spec := importlib.util.find_spec("vllm")) is not None:
        roots = [Path(root) for root in spec.submodule_search_locations or []]
    parts = ("", "sample", "v1/worker/gpu/sample", "vllm/v1/worker/gpu/sample")
    below = [root / part for root in roots for part in parts]
    return next((place for place in below if all((place / name).is_file() for name in FILES.values())), None)


@contextmanager
def _loaded(folder: Path) -> Iterator[None]:
    """Let the two files be found as vLLM's; undo it afterwards."""
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"}
    interpreted = os.environ.get("TRITON_INTERPRET")
    finder = _Finder(folder)
    for name in kept:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    if device() == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            del sys.modules[name]
        sys.modules.update(kept)
        os.environ.pop("TRITON_INTERPRET", None)
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted


def measure(*, dry_run: bool, files: Path | None = None) -> dict[str, Any]:
    """Return errors in nats against float64, the share of equal heads, and the spread of the draws."""
    folder = vllm_files(files)
    if folder is None:
        return {"skipped": "vllm is not installed; name a folder that holds its prompt_logprob.py with --vllm-files"}
    if not is_installed("triton"):
        return {"skipped": "triton is not installed"}
    from shared.recipe.sections.capture import TopSampleCapture

    vocab, rows = (1013, 1100) if dry_run else (151_936, 2048)
    draws = 4 if dry_run else 16
    capture = TopSampleCapture.model_validate(
        {"mode": "top+sample", "k": 8 if dry_run else 64, "draws": draws, "temperatures": [1.0, 2.0]}
    )
    with _loaded(folder):
        return {"rows": rows, "vocabulary": vocab, **_compare(capture, vocab, rows)}


def _compare(capture: Any, vocab: int, rows: int) -> dict[str, Any]:
    """Score a batch through the hook and compare."""
    import importlib

    import numpy as np
    import torch

    from teacher_cache.engines.columns.column_layout import ColumnLayout
    from teacher_cache.engines.columns.sparse_columns import targets_from_plugin
    from teacher_cache.engines.vllm import vllm_tail

    place, layout = device(), ColumnLayout.of(capture, vocab)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 64, generator=generator).to(place)
    weight = (torch.randn(vocab, 64, generator=generator) * 0.5).to(place)
    lengths, begun = np.array([rows // 3, rows - rows // 3]), np.array([0, 7])
    tokens = torch.randint(0, vocab, (4, rows + 8), generator=generator).to(place)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    batch = SimpleNamespace(
        req_ids=[vllm_tail.request_name(0, 5), vllm_tail.request_name(1, 9)],
        idx_mapping_np=np.array([2, 0]),
        idx_mapping=torch.tensor([2, 0], dtype=torch.int32, device=place),
        num_computed_prefill_tokens_np=begun,
        prefill_len_np=lengths + begun + 1,
        num_scheduled_tokens=lengths,
        query_start_loc_np=starts,
        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=place),
        num_tokens=rows,
    )
    computed = torch.zeros(4, dtype=torch.int32, device=place)
    computed[torch.tensor([2, 0], device=place)] = torch.tensor(begun, dtype=torch.int32, device=place)
    prompts = np.zeros(4, dtype=np.int64)
    prompts[[2, 0]] = lengths + begun + 1  # one token more than was scheduled: every row predicts a token
    vllm_tail._install_v2()
    kept, vllm_tail._layout = vllm_tail._layout, layout
    try:
        module = importlib.import_module(f"{PLACE}.prompt_logprob")
        worker = module.PromptLogprobsWorker(4, torch.device(place))
        worker.uses_prompt_logprobs[[2, 0]] = True
        worker.num_prompt_logprobs[[2, 0]] = layout.num_extra
        worker.in_progress_prompt_logprobs = {name: [] for name in batch.req_ids}
        worker.compute_prompt_logprobs(lambda part: part @ weight.t(), hidden, batch, tokens, computed, prompts)
        parts = [worker.in_progress_prompt_logprobs[name][0] for name in batch.req_ids]
    finally:
        vllm_tail._layout = kept
    found = _Scores.cat(parts)
    ids, values = found.logprob_token_ids.cpu().numpy().astype(np.int32), found.logprobs.float().cpu().numpy()
    targets = targets_from_plugin(ids, values, layout)
    labels = torch.cat(
        [tokens[row, start + 1 : start + 1 + count] for row, start, count in zip([2, 0], begun, lengths, strict=True)]
    )
    return _errors(targets, hidden.double() @ weight.double().t(), labels, layout)


def _errors(targets: Any, logits: Any, labels: Any, layout: Any) -> dict[str, Any]:
    """Return how far targets of all rows are from dense float64 logits [P, V]."""
    import numpy as np
    import torch

    place = logits.device
    log_p = logits.log_softmax(-1)
    owner = torch.as_tensor(np.repeat(np.arange(len(logits)), targets.counts), device=place)
    ids = torch.as_tensor(targets.ids.astype(np.int64), device=place)
    head = torch.as_tensor(targets.logprobs, device=place).double()
    found = {
        "error_label": _largest(
            torch.as_tensor(targets.label_logprobs, device=place) - log_p.gather(1, labels[:, None])[:, 0]
        ),
        "error_head": _largest(head - log_p[owner, ids]),
    }
    top = log_p.topk(layout.num_head, dim=-1).values
    least = torch.full((len(logits),), torch.inf, dtype=torch.float64, device=place)
    least = least.scatter_reduce(0, owner, head, "amin")
    found["error_smallest_of_head"] = _largest(
        least - top.gather(1, torch.as_tensor(targets.counts.astype(np.int64) - 1, device=place)[:, None])[:, 0]
    )
    is_member = torch.zeros_like(log_p, dtype=torch.bool)
    is_member[owner, ids] = True
    for j, temperature in enumerate(layout.temperatures):
        at = (logits / temperature).log_softmax(-1).masked_fill(is_member, -torch.inf)
        tail = at.logsumexp(-1)
        found[f"error_tail_at_{temperature:g}"] = _largest(
            torch.as_tensor(targets.tail_logmass[:, j], device=place) - tail
        )
        drawn = targets.draws[j]
        rows = torch.as_tensor(np.repeat(np.arange(len(logits)), drawn.counts), device=place)
        tokens = torch.as_tensor(drawn.ids.astype(np.int64), device=place)
        times = torch.as_tensor(drawn.multiplicities.astype(np.float64), device=place)
        found[f"draws_outside_head_at_{temperature:g}"] = 1 - float(is_member[rows, tokens].double().mean())
        found[f"z_of_draws_at_{temperature:g}"] = _z(at - tail[:, None], rows, tokens, times)
    return found


def _largest(difference: Any) -> float:
    return float(difference.abs().max())


def _z(log_tail: Any, rows: Any, tokens: Any, times: Any) -> float:
    """Return how many standard deviations the mean log-probability of the draws is from its expectation."""
    import torch

    mass, value = log_tail.exp(), log_tail.nan_to_num(neginf=0.0)
    mean = (mass * value).sum(-1)
    variance = (mass * value.square()).sum(-1) - mean.square()
    per_row = torch.zeros(len(log_tail), dtype=torch.float64, device=log_tail.device).index_add(0, rows, times)
    gap = (times * value[rows, tokens]).sum() - (per_row * mean).sum()
    return float(gap / (per_row * variance).sum().sqrt())
