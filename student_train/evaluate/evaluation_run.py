"""Evaluations of one stage while it trains: measured, logged, judged; cut back to the checkpoint's step on resume.

`evaluations.jsonl` and `samples.jsonl` hold nothing that depends on the machine's speed; like metrics.jsonl, an
interrupted and resumed stage writes the same bytes as one that was never interrupted. Cost: see heldout_measure.py and
quality_samples.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.cache.tokenizer_files import checked_tokenizer
from shared.cache.trained_ends import trained_ends
from shared.models.end_tokens import special_ids
from shared.models.files import load_tokenizer
from shared.models.forward.row_length import known_positions
from shared.recipe.recipe import StageEvaluation
from student_train.evaluate.heldout_measure import HeldoutSet, Processes, measure_heldout
from student_train.evaluate.quality_samples import choose_samples, student_answers
from student_train.evaluate.verdict import Verdict, judge
from student_train.records.metrics_log import StepLog, read_steps
from student_train.student.forward_patch import Objective

EVALUATIONS_FILE = "evaluations.jsonl"
SAMPLES_FILE = "samples.jsonl"


class EvaluationRun:
    """Evaluates a stage's student on the same held-out rows again and again."""

    def __init__(
        self,
        settings: StageEvaluation,
        heldout: HeldoutSet,
        base: Any,
        objective: Objective,
        pack_tokens: int,
        attention: str,
    ) -> None:
        """Prepare evaluations.

        Args:
            settings: the recipe's section.
            heldout: rows to measure on.
            base: the language model below any adapter, its forward patched with `objective`.
            objective: of the patched forward.
            pack_tokens: room of a pack.
            attention: attention implementation for the samples.

        Raises:
            TrainingError: every row is longer than the student reads.
        """
        longest = known_positions(base.config.get_text_config())
        self.settings = settings
        self._heldout = heldout if longest is None else heldout.within(longest)
        self._packs = self._heldout.packs(pack_tokens)
        self._base, self._objective, self._attention = base, objective, attention
        self._tokenizer = _tokenizer_of(heldout.caches.caches[0].path) if settings.samples else None
        self._samples = choose_samples(self._heldout, settings.samples, self._tokenizer) if settings.samples else []
        self._trained_end_ids: tuple[int, ...] = ()
        if self._samples:
            special = special_ids(self._tokenizer)
            ends = (end for cache in heldout.caches.caches for end in trained_ends(cache, special))
            self._trained_end_ids = tuple(dict.fromkeys(ends))
        self._evaluations: list[dict[str, Any]] = []
        self._logs: tuple[StepLog, ...] = ()

    def open(self, directory: Path, step: int | None, *, writes: bool) -> None:
        """Take up the evaluations up to a checkpoint's step, or begin anew; only one process `writes`."""
        last_step = -1 if step is None else step
        self._evaluations = evaluations_until(directory, last_step)
        if writes:
            names = [EVALUATIONS_FILE, *([SAMPLES_FILE] if self._samples else [])]
            self._logs = tuple(StepLog(directory / name, last_step) for name in names)

    def sync(self) -> None:
        """Make every line so far survive a power cut."""
        for log in self._logs:
            log.sync()

    def close(self) -> None:
        """Close the files."""
        for log in self._logs:
            log.close()

    def is_due(self, step: int, last_step: int) -> bool:
        """Return whether to evaluate after a step: every so many, and after the last."""
        return step % self.settings.every_steps == 0 or step == last_step

    @property
    def verdict(self) -> Verdict:
        """What the evaluations so far say."""
        return judge(self._evaluations, self.settings.early_stopping)

    @property
    def is_best(self) -> bool:
        """Say whether the last evaluation is the best so far."""
        return bool(self._evaluations) and self.verdict.best_step == self._evaluations[-1]["step"]

    def evaluate(self, step: int, model: Any, processes: Processes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Measure the student after `step` steps, write it down, and return the figures and the sample answers."""
        figures = {"step": step, **measure_heldout(model, self._objective, self._heldout, self._packs, processes)}
        self._evaluations.append(figures)
        samples = self._answer(step, model)
        if self._logs:
            self._logs[0].write(figures)
            for sample in samples:
                self._logs[1].write(sample)
        return figures, samples

    def _answer(self, step: int, model: Any) -> list[dict[str, Any]]:
        if not self._samples:
            return []
        settings = self.settings
        answers = student_answers(
            model,
            self._base,
            self._samples,
            self._tokenizer,
            self._trained_end_ids,
            self._attention,
            settings.sample_tokens,
        )
        return [
            {
                "step": step,
                "source": sample.source,
                "prompt": sample.prompt,
                "student": answer,
                "teacher": sample.teacher,
            }
            for sample, answer in zip(self._samples, answers, strict=True)
        ]


def evaluations_until(directory: Path, step: int) -> list[dict[str, Any]]:
    """Return a stage's evaluations up to a step, oldest first."""
    return [record for record in read_steps(directory / EVALUATIONS_FILE) if record["step"] <= step]


def _tokenizer_of(cache_dir: Path) -> Any:
    with checked_tokenizer(cache_dir) as directory:
        return load_tokenizer(directory, trust_remote_code=False)


def evaluation_line(figures: Mapping[str, Any]) -> str:
    """Return one line for a log.

    >>> evaluation_line({"step": 9, "kl_nats": 0.51, "top1_agreement": 0.5, "perplexity": 3.0, "by_source": {}})
    'step 9: held-out KL 0.5100 nats per position, top-1 agreement 50.0 %, perplexity 3.00'
    """
    apart = {**figures["by_source"], **{f"from {key}": part for key, part in figures.get("by_layer", {}).items()}}
    parts = ", ".join(f"{name} {part['kl_nats']:.4f}" for name, part in apart.items())
    sources = f" ({parts})" if parts else ""
    perplexity = "beyond measure" if figures["perplexity"] is None else f"{figures['perplexity']:.2f}"
    return (
        f"step {figures['step']:,}: held-out KL {figures['kl_nats']:.4f} nats per position{sources}, "
        f"top-1 agreement {100 * figures['top1_agreement']:.1f} %, perplexity {perplexity}"
    )


def reported_figures(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures under the names that TensorBoard and others group as evaluation."""
    names = ("kl_nats", "top1_agreement", "perplexity")
    flat = {f"eval_{name}": figures[name] for name in names}
    for source, part in figures["by_source"].items():
        flat |= {f"eval_{name}/{source}": part[name] for name in names}
    for key, part in figures.get("by_layer", {}).items():
        flat |= {f"eval_{name}/from {key}": part[name] for name in names[:2]}
    return {name: value for name, value in flat.items() if value is not None}


def sample_text(sample: Mapping[str, str]) -> str:
    """Return one sample as text for a page of samples."""
    parts = (("prompt", sample["prompt"]), ("student", sample["student"]), ("cached answer", sample["teacher"]))
    return "\n\n".join(f"**{title}**\n\n{_indented(text)}" for title, text in parts)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def show_samples(samples: Sequence[Mapping[str, Any]], callbacks: Sequence[Any]) -> None:
    """Hand sample answers to TensorBoard and wandb, where they are among the Trainer's callbacks."""
    for callback in callbacks:
        kind = type(callback).__name__
        writer = getattr(callback, "tb_writer", None)
        if kind == "TensorBoardCallback" and writer is not None:
            for number, sample in enumerate(samples):
                writer.add_text(f"samples/{number}-{sample['source']}", sample_text(sample), sample["step"])
        if kind == "WandbCallback" and getattr(callback, "_wandb", None) is not None and samples:
            columns = list(samples[0])
            table = callback._wandb.Table(
                columns=columns, data=[[sample[name] for name in columns] for sample in samples]
            )
            callback._wandb.log({"samples": table, "train/global_step": samples[0]["step"]})
