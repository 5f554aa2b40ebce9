"""Which models a recipe compares: the teacher, the student as it was (`base`), and the student after each stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from shared.errors import EvaluationError
from shared.identity.weights_hash import weights_hash
from shared.recipe.recipe import Recipe, Teacher
from shared.recipe.sections.teacher import VllmTeacher
from teacher_cache.teacher.model_files import ModelFiles, resolve_model

_SECTION: TypeAdapter[Teacher] = TypeAdapter(Teacher)


@dataclass(frozen=True, slots=True)
class ModelUnderTest:
    """One model of the comparison, and how to load it."""

    name: str
    """teacher, base or a stage."""
    files: ModelFiles
    adapter: str | None
    """A LoRA directory on top, or None."""
    dtype: str
    quantization: str | None
    trust_remote_code: bool

    def weights_id(self) -> str:
        """Return what changes when its weights do: a hash of its files.

        Raises:
            ModelError: the directory holds no weights that can be read.
        """
        base = weights_hash(self.files.directory)
        return base if self.adapter is None else f"{base}+{weights_hash(Path(self.adapter))}"

    def settings(self, recipe: Recipe, max_model_len: int) -> Teacher:
        """Return engine settings that load this model for answering.

        Raises:
            EvaluationError: the evaluation's engine cannot load it as the recipe says.
        """
        # How much of the machine may be used is the teacher's section, for every model; one card is enough for a
        # student.
        shared = recipe.teacher or VllmTeacher(model=str(self.files.directory))
        shards = shared.tensor_parallel_size if self.name in ("teacher", *recipe.teachers) else 1
        wanted = {
            **{name: value for name, value in shared if name in ("gpu_memory_utilization", "max_num_batched_tokens")},
            "model": str(self.files.directory),
            "adapter": self.adapter,
            "dtype": self.dtype,
            "trust_remote_code": self.trust_remote_code,
            "engine": recipe.evaluate.engine,
            "max_model_len": max_model_len,
            # Answering holds one position of logits per row where scoring holds all of them: room for four times as
            # many.
            "batch_tokens": 4 * shared.batch_tokens,
            **({} if self.quantization is None else {"quantization": self.quantization}),
            **({} if shards == 1 else {"tensor_parallel_size": shards}),
        }
        try:
            return _SECTION.validate_python(wanted)
        except ValidationError as error:
            first = error.errors()[0]
            said = ": ".join(map(str, (*first["loc"][1:], first["msg"])))  # the first is the engine
            raise EvaluationError(
                f"evaluate.engine '{recipe.evaluate.engine}' cannot load '{self.name}': {said}"
            ) from error


def model_under_test(recipe: Recipe, name: str) -> ModelUnderTest:
    """Find a model of the recipe by its name in `evaluate.models`; a hub id is downloaded once.

    Raises:
        EvaluationError: it does not exist (yet), or cannot be evaluated.
        EngineError: it is neither a model directory nor a hub id that can be fetched.
    """
    if name == "teacher" or name in recipe.teachers:
        teacher = recipe.teachers.get(name, recipe.teacher)
        if teacher is None:
            raise EvaluationError(
                "evaluate.models lists 'teacher', but the recipe has no teacher; add one, or leave it out"
            )
        files = resolve_model(teacher.model, teacher.revision)
        return ModelUnderTest(
            name, files, teacher.adapter, teacher.dtype, teacher.quantization, teacher.trust_remote_code
        )
    student = recipe.student
    if student is None:
        raise EvaluationError(
            f"evaluate.models lists '{name}', but the recipe has no student; add one, or leave it out"
        )
    if name == "base":
        if student.init == "random":
            raise EvaluationError(
                "evaluate.models lists 'base', but the student starts from random weights, which no one keeps; leave "
                "it out"
            )
        files = resolve_model(student.model, student.revision)
        return ModelUnderTest(name, files, None, student.dtype, None, student.trust_remote_code)
    directory = recipe.stage_dir(name) / "model"
    if not directory.is_dir():
        raise EvaluationError(
            f"evaluate.models lists '{name}', but {directory} does not exist; run `decant train` first"
        )
    return ModelUnderTest(name, resolve_model(str(directory)), None, student.dtype, None, student.trust_remote_code)
