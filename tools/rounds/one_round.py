"""One round of a stage as three derived recipes: what answers, what scores, what trains, and where each of them writes.

Own answers go to OUTPUT_DIR/own/STAGE, one job per round; the teacher's cache is only read. Rows are labelled by their
round (`own 2: math`), so that a mixture of sources says which rounds are trained on, and how much of them. A round
trains as a stage of its own in train/STAGE/round-N, from the model of the round before. Cost: small files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shared.cache.layout import sequences_dir
from shared.errors import UsageError
from shared.parts.jobs import Job, list_jobs
from shared.parts.records import list_records
from shared.recipe.recipe import PromptSource, Recipe, Rounds, Schedule, Stage, Teacher
from shared.recipe.sections.teacher import engine_of_student, on_engine
from student_train.stage.stage_start import start_directory
from teacher_cache.student_answers import Asking, answers_as

_OF_A_TEACHER = {
    "revision": None,
    "adapter": None,
    "quantization": None,
    "tensor_parallel_size": 1,
    "workers": None,
}
"""Settings of the teacher's section that say nothing about a student."""


@dataclass(frozen=True)
class Round:
    """One round of a stage."""

    recipe: Recipe
    stage: Stage
    number: int
    """From 1."""

    @property
    def settings(self) -> Rounds:
        """The stage's section."""
        assert self.stage.rounds is not None
        return self.stage.rounds

    @property
    def own_cache(self) -> Path:
        """Directory of the cache of own answers, which all rounds of the stage share."""
        return self.recipe.output_dir / "own" / self.stage.name

    @property
    def directory(self) -> Path:
        """Directory in which the round trains."""
        return self.recipe.stage_dir(self.training_name)

    @property
    def training_name(self) -> str:
        """Name of the stage that trains the round: 'own/round-1'."""
        return f"{self.stage.name}/round-{self.number}"

    @property
    def seed(self) -> int:
        """Seed of prompts and answers."""
        return self.recipe.seed if self.settings.seed is None else self.settings.seed

    @property
    def asking(self) -> Asking:
        """Which prompts the student is asked."""
        return Asking(self.number, self.settings.prompts, self.recipe.heldout.fraction, False, self.seed)

    @cached_property
    def start(self) -> Path | None:
        """Model directory that answers and is trained on; None for the student's own weights.

        Raises:
            UsageError: the round before has no model yet.
            TrainingError: the stage's start has none.
        """
        if self.number == 1:
            return start_directory(self.recipe, self.stage)
        directory = Round(self.recipe, self.stage, self.number - 1).directory / "model"
        if not (directory / "config.json").is_file():
            raise UsageError(
                f"round {self.number} of stage '{self.stage.name}' begins with the model of round {self.number - 1}, "
                f"which is not in {directory}; finish that round first"
            )
        return directory

    @property
    def _sources(self) -> tuple[PromptSource, ...]:
        """Sources that hold prompts."""
        return tuple(source for source in self.settings.sources or self.recipe.prompts if source.of_turns)

    def labelled(self, number: int) -> tuple[PromptSource, ...]:
        """Return the sources of prompts, each labelled as rows of round `number`, such as 'own 2: math'."""
        return tuple(source.model_copy(update={"source": f"own {number}: {source.source}"}) for source in self._sources)

    def answering(self) -> Recipe:
        """Return the recipe of the build in which the student answers; its `teacher` is the student."""
        recipe, settings = self.recipe, self.settings
        return recipe.model_copy(
            update={
                "teacher": as_answering(recipe, self.start, settings.engine),
                "prompts": self.labelled(self.number),
                "generate": answers_as(recipe, settings, self.seed, settings.samples_per_prompt),
                "cache": (self.own_cache,),
            }
        )

    def asking_once(self) -> Recipe:
        """Return the recipe in which the teacher would answer each prompt that rounds may ask once, to count them."""
        generate = answers_as(self.recipe, self.settings, self.seed)
        return self.recipe.model_copy(
            update={"prompts": self._sources, "generate": generate, "cache": (self.own_cache,)}
        )

    def scoring(self) -> Recipe:
        """Return the recipe of the build in which the teacher scores what is in the own cache."""
        return self.recipe.model_copy(update={"prompts": (), "generate": None, "cache": (self.own_cache,)})

    def training(self, mixture: Mapping[str, float] | None = None) -> Recipe:
        """Return the recipe whose stage `STAGE/round-N` trains this round, on shares of the sources."""
        stage = self.stage.model_copy(
            update={
                "name": self.training_name,
                "init_from": self.stage.init_from if self.number == 1 else str(self.start),
                "rounds": None,
                "mixture": {name: Schedule(start=share) for name, share in mixture.items()} if mixture else None,
            }
        )
        stages = tuple(stage if other.name == self.stage.name else other for other in self.recipe.stages)
        return self.recipe.model_copy(update={"cache": (*self.recipe.cache, self.own_cache), "stages": stages})

    def found_job(self) -> Job | None:
        """Return the job of the round's answers, once they are all there; None before."""
        found = [job for job in list_jobs(self.own_cache) if job.request.get("round", {}).get("number") == self.number]
        committed = frozenset(record.stem for record in list_records(sequences_dir(self.own_cache)))
        return found[0] if found and found[0].is_complete(committed) else None

    def job(self) -> Job:
        """Return the job of the round's answers, once they are all there.

        Raises:
            UsageError: they are not.
        """
        job = self.found_job()
        if job is None:
            raise UsageError(
                f"round {self.number} of stage '{self.stage.name}' has not all of its answers in {self.own_cache}; let "
                f"the student answer first: decant rounds RECIPE --stage {self.stage.name} --only answer --round "
                f"{self.number}"
            )
        return job


def as_answering(recipe: Recipe, start: Path | None, engine: str | None) -> Teacher:
    """Return how an engine opens a student: the teacher's settings without what belongs to the teacher alone."""
    teacher, student = recipe.teacher, recipe.student
    assert teacher is not None
    assert student is not None
    own = {"model": student.model, "revision": student.revision} if start is None else {"model": str(start)}
    changes = {**_OF_A_TEACHER, **own, "trust_remote_code": student.trust_remote_code}
    return on_engine(engine_of_student(teacher, engine), teacher, **changes)
