"""Small models on a CPU are evaluated at the same time, a thread each; others one by one, with the whole machine.

A second thread does nothing for a model whose products are small (measured: 21.0 s of answers with one thread, 19.8 s
with two); a second model beside it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait

from shared.models.gpus import list_gpus
from shared.models.weights.weight_headers import weight_files
from shared.process.machine import memory_bytes, num_cores
from shared.recipe.recipe import Recipe
from shared.recipe.sections.teacher import is_one_process
from tools.evaluate.models.model_process import end_running
from tools.evaluate.models.models import ModelUnderTest

SMALL_BYTES = 256 << 20
"""Largest weights of a small model, on disk."""
_PROCESS_BYTES = 3 << 30
"""Memory of this machine, used or not, for each process of a small model: such a process takes a third of it."""


def num_at_once(recipe: Recipe, models: Sequence[ModelUnderTest]) -> int:
    """Return how many of the models are evaluated at the same time.

    Raises:
        ModelError: a model has no weights.
    """
    if not is_one_process(recipe.evaluate.engine) or len(models) < 2 or list_gpus():
        return 1
    sizes = [sum(file.stat().st_size for file in weight_files(model.files.directory)) for model in models]
    if max(sizes) > SMALL_BYTES:
        return 1
    return max(1, min(len(models), num_cores(), memory_bytes() // _PROCESS_BYTES))


def run_jobs(jobs: Sequence[Callable[[], None]], at_once: int) -> None:
    """Run every job, `at_once` at a time; the first that fails ends the processes of the others and is raised."""
    if at_once == 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(at_once) as pool:
        running = [pool.submit(job) for job in jobs]
        try:
            for done in as_completed(running):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while left := [job for job in running if not job.done()]:  # one that was about to start its process does
                end_running()  # so yet; one that was cancelled is done, which `wait` does not see
                wait(left, timeout=0.1)
            raise
