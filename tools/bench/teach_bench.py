"""Does `decant teach` keep its engine busy? The same requests through vLLM alone and through a whole build, in one
process.

Straight: requests are added to vLLM and its steps run, arrays of log-probabilities kept as ours are, results thrown
    away. Build:
the whole of `decant teach` with that same started engine: render, feed, convert, encode, compress, checksum, write,
fsync. They alternate, each round in the other order, with a fresh cache. Times run from the first request to the last
result or the last part on disk; start-up, planning and reading the tokenizer are part of neither side. Prompts,
answers' seeds and sequences are the same, so the tokens are too. CPU figures are those of the thread that runs the
engine, which other processes do not disturb.

Two models answer the demo's prompts, k = 64 without a cut by mass. `demo_2M` is the demo's teacher (2.3 million
parameters, width 192): so small that whatever this side costs shows. `random_26M` is a Qwen3 of 26 million random
weights with the same tokenizer, its answers cut at 28 tokens, the mean length of the demo's.
Cost: about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.recipe.file import load_recipe
from shared.recipe.recipe import Recipe
from teacher_cache import build, engines
from teacher_cache.engines.protocol import GenerateRequest, ScoreRequest
from teacher_cache.passes.summary import BuildSummary

RECIPE = Path("recipes/demo.yaml")
ROUNDS = 3
MODELS = ("demo_2M", "random_26M")
ROWS_PER_SOURCE = 100
"""Prompts of each of the three sources that the larger model answers."""


class Kept:
    """An engine that a build opens and closes while it runs on, and that counts what passes."""

    def __init__(self, engine: Any) -> None:
        """Wrap a started engine."""
        self.inner = engine
        self.requests: dict[str, list[Any]] = {"generate": [], "score": []}
        self.cpu_seconds: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def generate(self, requests: Iterable[GenerateRequest], settings: Any) -> Any:
        """Pass on, keeping the requests."""
        return self._timed("generate", self.inner.generate(self._noted("generate", requests), settings))

    def score(self, requests: Iterable[ScoreRequest]) -> Any:
        """Pass on, keeping the requests."""
        return self._timed("score", self.inner.score(self._noted("score", requests)))

    def _timed(self, kind: str, results: Iterable[Any]) -> Iterable[Any]:
        """Count CPU seconds of this thread from the first request to the last result, whoever spends them."""
        started = time.thread_time()
        yield from results
        self.cpu_seconds[kind] = time.thread_time() - started

    def _noted(self, kind: str, requests: Iterable[Any]) -> Iterable[Any]:
        for request in requests:
            self.requests[kind].append(request)
            yield request

    def close(self) -> None:
        """Stay open for the next round."""


def run(models: Iterable[str] = MODELS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure both passes on both sides for each model.

    Returns:
        Per model and pass, medians over rounds: straight_ and build_tokens_per_second; share, the build's rate over the
        straight one, and cpu_share, the same of the engine thread's CPU time; waiting_share of the build's seconds in
        which the engine stood still for the writer, and writing_share, the writer thread's seconds over the build's.
    """
    return {model: _run_model(model, rounds) for model in models}


def _run_model(model: str, rounds: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="decant-teach-bench-") as scratch:
        settings = [f"output_dir={scratch}/run", f"cache={scratch}/warm", "capture.mass=1.0"]
        if model == "random_26M":
            settings += [f"teacher.model={_random_model(Path(scratch))}", "generate.max_new_tokens=28"]
        recipe = load_recipe(RECIPE, settings)
        if model == "random_26M":
            few = tuple(source.model_copy(update={"limit": ROWS_PER_SOURCE}) for source in recipe.prompts)
            recipe = recipe.model_copy(update={"prompts": few})
        opener, engine = engines.open_engine, _open(recipe)
        try:
            return _measured(Kept(engine), recipe, Path(scratch), rounds)
        finally:
            engines.open_engine = opener
            engine.close()


def _random_model(scratch: Path) -> Path:
    """Save a Qwen3 of 26 million random weights with the demo's tokenizer."""
    import torch

    from shared.models.files import load_tokenizer
    from tools.demo.train_models import PLANS, new_model

    tokenizer = load_tokenizer("data/demo/teacher", trust_remote_code=False)
    plan = replace(
        PLANS["teacher"],
        hidden_size=512,
        num_layers=8,
        intermediate_size=1536,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
    )
    directory = scratch / "model"
    new_model(plan, tokenizer).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _measured(engine: Kept, recipe: Recipe, scratch: Path, rounds: int) -> dict[str, Any]:
    engines.open_engine = lambda *_, **__: engine
    _teach(engine, recipe, scratch / "warm")  # warms kernels and caches, and lists the requests
    asked = {kind: list(requests) for kind, requests in engine.requests.items()}
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in asked}
    for number in range(rounds):
        sides: dict[str, Any] = {}
        for side in ("straight", "build") if number % 2 else ("build", "straight"):
            if side == "build":
                sides[side] = _teach(engine, recipe, scratch / f"round{number}")
            else:
                sides[side] = {kind: _straight(engine.inner, kind, asked[kind], recipe) for kind in asked}
        for kind, figures in (("generate", sides["build"].generated), ("score", sides["build"].scored)):
            seconds, cpu_seconds = sides["straight"][kind]
            found[kind].append(
                {
                    "straight_tokens_per_second": figures.tokens / seconds,
                    "build_tokens_per_second": figures.tokens / figures.seconds,
                    "share": seconds / figures.seconds,
                    "cpu_share": cpu_seconds / engine.cpu_seconds[kind],
                    "waiting_share": figures.seconds_waiting / figures.seconds,
                    "writing_share": figures.seconds_writing / figures.seconds,
                }
            )
    return {
        kind: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for kind, rows in found.items()
    }


def _open(recipe: Recipe) -> Any:
    from teacher_cache.teacher.teacher_identity import know_teacher

    assert recipe.teacher is not None
    known = know_teacher(recipe.teacher)
    return engines.open_engine(
        recipe.teacher, recipe.capture, for_generation=recipe.generate, model_dir=known.files.directory
    )


def _teach(engine: Kept, recipe: Recipe, cache: Path) -> BuildSummary:
    gc.collect()
    engine.requests, engine.cpu_seconds = {"generate": [], "score": []}, {}
    return build.teach(recipe.model_copy(update={"cache": (cache,)}))


def _straight(inner: Any, kind: str, requests: list[Any], recipe: Recipe) -> tuple[float, float]:
    """Return seconds and CPU seconds of vLLM alone with these requests, as many in flight as a build keeps there."""
    from teacher_cache.engines.vllm import vllm_engine, vllm_self_test

    gc.collect()
    core = inner._llm.llm_engine
    num_columns = inner._layout.num_extra

    def parameters(request: Any) -> Any:
        if kind == "generate":
            return inner.answer_parameters(request, recipe.generate)
        return vllm_self_test.scoring_parameters(num_columns)

    started, cpu_started = time.monotonic(), time.thread_time()
    running, number = 0, 0
    while running or number < len(requests):
        while number < len(requests) and running < vllm_engine.MAX_IN_FLIGHT:
            request = requests[number]
            token_ids = [int(token) for token in request.token_ids]
            core.add_request(f"straight-{kind}-{number}", {"prompt_token_ids": token_ids}, parameters(request))
            number, running = number + 1, running + 1
        running -= sum(output.finished for output in core.step())
    return time.monotonic() - started, time.thread_time() - cpu_started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Compare vLLM alone with a whole `decant teach` for the same requests."
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="which models to measure")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"alternations of both sides; default {ROUNDS}")
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.models, arguments.rounds), indent=2))
