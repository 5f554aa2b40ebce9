"""What is known to be wrong with a recipe before any work: one table of checks, for plan, teach, train and run.

Each check yields places of the recipe and sentences; all of them are reported at once, with file and line. A check that
needs an earlier one to hold says nothing where that one spoke. A command that only plans may do without models and data
whose sizes the recipe states under `assume`, and without the packages of the machine that will train.
Cost: small files, the tasks' questions, and tokenizers where their files alone do not say that they are the same.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.cache.layer_choice import layer_of_capture
from shared.cache.layout import choose_layer, list_hidden_layers, list_layers, read_header, sequences_dir
from shared.cache.rendering import template_text
from shared.errors import DecantError
from shared.identity.identity import layer_short_name, tokenizer_hash
from shared.parts.records import list_records
from shared.payload.narrowing import LayerView
from shared.recipe.base import Problem, closest, quoted
from shared.recipe.file import Where, listed
from shared.recipe.losses import LOSSES_ON_HIDDEN_LAYER
from shared.recipe.optimizers import OPTIMIZERS
from shared.recipe.recipe import Recipe
from shared.recipe.training import Stage, StageTrainer

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
LAYER_NAME = re.compile(r"(top\d+)?(-?sample\d+)?", re.ASCII)
HUB_SECONDS = 3
"""How long a hub is waited for."""
"""Known without asking transformers."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of a recipe."""

    recipe: Recipe
    phases: frozenset[str]
    """Those that will run: teach, train, eval, report."""
    plans_only: bool

    @property
    def caches(self) -> list[Path]:
        """Return the caches that are there."""
        return [path for path in self.recipe.cache if (path / "cache.json").is_file()]

    @property
    def elsewhere(self) -> bool:
        """Return whether a recipe of stated sizes is only priced, on a machine without its files and packages."""
        return self.plans_only and bool(self.recipe.assume.model_fields_set)

    @property
    def builds(self) -> bool:
        """Return whether rows or targets may come that are not there yet."""
        return "teach" in self.phases


def preflight(recipe: Recipe, where: Where, phases: Collection[str], *, plans_only: bool) -> None:
    """Refuse a recipe of which `phases` could not run.

    Args:
        recipe: the recipe.
        where: where its values were written.
        phases: of teach, train, eval and report, those that will run.
        plans_only: whether it is only planned, perhaps on another machine.

    Raises:
        RecipeError: with a line for each problem: `file:line: path: what was found, what was expected, what to do`.
    """
    asked, problems = Asked(recipe, frozenset(phases), plans_only), dict[tuple[str | int, ...], str]()
    for needed, check in CHECKS:
        if needed in ("any", *phases):
            for place, sentence in check(asked):
                problems.setdefault(place, sentence)
    if problems:
        raise listed(problems.items(), where)


def _said(place: tuple[str | int, ...], work: Callable[[], object]) -> Iterator[Problem]:
    """Yield what an attempt raises as a problem of a place."""
    try:
        work()
    except (DecantError, OSError) as error:
        yield place, " ".join(str(error).split())


def _places(asked: Asked) -> Iterator[Problem]:
    """Check that directories can be written to."""
    places: list[tuple[tuple[str | int, ...], Path]] = [(("output_dir",), asked.recipe.output_dir)]
    places += [(("cache", i), path) for i, path in enumerate(asked.recipe.cache)]
    for place, path in places:
        try:
            there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        except OSError as error:
            yield place, f"'{str(path)[:60]}' cannot be a directory ({error.strerror}); name another"
            continue
        if not there.is_dir():
            yield place, f"'{there}' is a file where a directory is expected; remove it or name another"
        elif not os.access(there, os.W_OK) and (place[0] != "cache" or asked.builds):
            yield place, f"'{there}' cannot be written to; correct its permissions or name another"
        elif place[0] == "cache" and path.is_dir() and not (path / "cache.json").exists() and any(path.iterdir()):
            yield place, f"'{path}' holds files and is no cache (it has no cache.json); name another directory"


def _model(name: str, revision: str | None, *, weights: bool, stated: bool) -> str | None:
    """Say why a model cannot be had, or None; `stated`: its sizes are enough, where no directory is meant."""
    directory = Path(name).expanduser()
    if directory.is_dir():
        from teacher_cache.teacher.model_files import resolve_model

        found = next((sentence for _, sentence in _said((), lambda: resolve_model(name, revision))), None)
        if found is None and weights and not any(directory.glob("*.safetensors")):
            return f"'{name}' has no *.safetensors; expected the directory of a model with its weights"
        return found
    if directory.exists():
        return f"'{name}' is a file; expected a model's directory or a hub id"
    if not HUB_ID.fullmatch(name):
        near = [path.name for path in directory.parent.iterdir()] if directory.parent.is_dir() else []
        return f"there is no directory '{name}'{closest(directory.name, sorted(near))}; expected a model's directory"
    return None if stated else _fetched(name, revision)


def _fetched(name: str, revision: str | None) -> str | None:
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, "config.json", revision=revision, etag_timeout=HUB_SECONDS)
    except Exception as error:  # noqa: BLE001 - offline, missing, forbidden, no valid id: none of them gives a model
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        return (
            f"'{name}' is neither a directory nor a hub id that can be fetched ({reason}); correct it, or download the "
            "model and name its directory"
        )
    return None


def _teacher(asked: Asked) -> Iterator[Problem]:
    """Check the teacher, its adapter, the model that answers and the engine."""
    teacher, generate = asked.recipe.teacher, asked.recipe.generate
    if teacher is None:
        return
    stated = asked.plans_only and (asked.recipe.assume.teacher is not None or bool(asked.recipe.assume.sources))
    problem = _model(teacher.model, teacher.revision, weights=not asked.plans_only, stated=stated)
    if problem:
        yield ("teacher", "model"), problem
    adapter = None if asked.elsewhere else teacher.adapter
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        yield ("teacher", "adapter"), f"'{adapter}' has no adapter_config.json; expected a LoRA's directory"
    if generate is not None and generate.model is not None:
        answers = _model(generate.model, None, weights=not asked.plans_only, stated=asked.plans_only)
        if answers:
            yield ("generate", "model"), answers
    if not asked.plans_only:
        from teacher_cache.engines import refusal

        reason = refusal(teacher, asked.recipe.capture)
        if reason is not None:
            yield ("teacher", "engine"), reason


def _prompts(asked: Asked) -> Iterator[Problem]:
    """Check that every source of prompts and every template is there, and every cache that rows are taken from."""
    from teacher_cache.prompts.prompt_files import locate

    for i, prompt in enumerate(asked.recipe.prompts):
        if prompt.format == "cache":
            yield from _said(("prompts", i, "path"), lambda path=Path(prompt.path): read_header(path))  # type: ignore[misc]
        elif not (asked.plans_only and prompt.source in asked.recipe.assume.sources):
            yield from _said(("prompts", i, "path"), lambda prompt=prompt: locate(prompt))  # type: ignore[misc]
        yield from _said(
            ("prompts", i, "chat_template"),
            lambda prompt=prompt: template_text(prompt.chat_template),  # type: ignore[misc]
        )
    if not asked.recipe.prompts and asked.recipe.teacher is not None and not asked.caches:
        yield ("cache",), f"there is no cache at '{asked.recipe.cache[0]}' to score; add `prompts`, or name a cache"


def _student(asked: Asked) -> Iterator[Problem]:
    """Check the student's files, and that its tokens are those of the cache or the teacher."""
    recipe, student = asked.recipe, asked.recipe.student
    if student is None:
        return
    random = student.init == "random"
    weights = not random and not asked.plans_only and any(stage.init_from == "base" for stage in recipe.stages)
    stated = asked.plans_only and recipe.assume.student is not None
    problem = _model(student.model, student.revision, weights=weights, stated=stated)
    if problem:
        yield ("student", "model"), problem
    elif Path(student.model).is_dir():
        yield from _tokenizer(asked, Path(student.model), required=not random)
    if random and student.adapter.kind == "qlora":
        yield ("student", "adapter"), "qlora holds weights in 4 bits and `init: random` makes fresh ones; use none"


def _tokenizer(asked: Asked, directory: Path, *, required: bool) -> Iterator[Problem]:
    teacher, student = asked.recipe.teacher, asked.recipe.student
    assert student is not None
    own = directory / "tokenizer.json"
    if not own.is_file():
        if required and not any(directory.glob("*tokenizer*")) and not any(directory.glob("vocab.*")):
            yield ("student", "model"), f"'{directory}' has no tokenizer.json; copy the teacher's tokenizer to it"
        return
    if asked.caches:
        wanted, whose = read_header(asked.caches[0]).identity.tokenizer_hash, f"the cache {asked.caches[0]}"
    elif teacher is not None and (Path(teacher.model) / "tokenizer.json").is_file():
        wanted, whose = tokenizer_hash((Path(teacher.model) / "tokenizer.json").read_bytes()), "the teacher"
    else:
        return
    found = tokenizer_hash(own.read_bytes())
    if found == wanted:
        return
    from teacher_cache.teacher.model_files import load_tokenizer, resolve_model, tokenizer_files

    def loaded(model: str, *, trusts: bool) -> str:
        files = tokenizer_files(load_tokenizer(resolve_model(model), trust_remote_code=trusts))
        return tokenizer_hash(files["tokenizer.json"])

    def compare() -> None:
        theirs = wanted
        if not asked.caches:
            assert teacher is not None
            theirs = loaded(teacher.model, trusts=teacher.trust_remote_code)
        mine = loaded(str(directory), trusts=student.trust_remote_code)
        if theirs not in (mine, found):
            raise DecantError(
                f"'{directory}' has tokenizer {mine[:8]} and {whose} has {theirs[:8]}; choose a student with the same "
                "tokenizer, or build a cache for this one"
            )

    yield from _said(("student", "model"), compare)


def _stages(asked: Asked) -> Iterator[Problem]:
    """Check what each stage reads: where it starts, layers, temperatures, sources, optimizer, reporters."""
    for i, path in enumerate(asked.recipe.cache):
        if path not in asked.caches and not asked.builds:
            yield (
                ("cache", i),
                f"there is no cache at '{path}' to train from; build it with `decant teach`, or name another",
            )
    sources = _sources(asked)
    for i, stage in enumerate(asked.recipe.stages):
        if "/" in stage.init_from:
            from student_train.stage.stage_start import model_directory

            def there(stage: Stage = stage) -> None:
                if not (model_directory(stage.name, stage.init_from) / "config.json").is_file():
                    raise DecantError(f"'{stage.init_from}' holds no config.json; name the directory of a model")

            yield from _said(("stages", i, "init_from"), there)
        unknown = [name for name in stage.mixture or {} if sources is not None and name not in sources]
        for name in unknown:
            near = closest(name, sorted(sources or ()))
            known = quoted(sorted(sources or ()))
            yield ("stages", i, "mixture", name), f"no row has the source '{name}'; expected {known}{near}"
        yield from ((("stages", i, *place), said) for place, said in _layers(asked, stage))
        yield from ((("stages", i, "trainer", *place), said) for place, said in _trainer(asked, stage.trainer))


def _sources(asked: Asked) -> set[str] | None:
    """Return the sources that the rows have or will have; None where that cannot be said."""
    if any(prompt.format == "cache" and not prompt.source for prompt in asked.recipe.prompts):
        return None
    found = {prompt.source for prompt in asked.recipe.prompts} if asked.builds else set()
    for path in asked.caches:
        for record in list_records(sequences_dir(path)):
            found |= set(record.stats.get("sources", {}))
    return found or None


def _layers(asked: Asked, stage: Stage) -> Iterator[Problem]:
    """Check that the layers that a stage names are there or will be, with its temperatures."""
    recipe = asked.recipe
    reads = [loss.name for loss in stage.losses]
    on_hidden = [(j, name) for j, name in enumerate(reads) if name in LOSSES_ON_HIDDEN_LAYER]
    if on_hidden and not (asked.builds and recipe.capture.hidden):
        for path in asked.caches or recipe.cache:
            if not list_hidden_layers(path):
                sentence = f"'{on_hidden[0][1]}' reads a hidden layer and {path} has none; add capture.hidden"
                yield ("losses", on_hidden[0][0], "name"), sentence
    if not any(name not in (*LOSSES_ON_HIDDEN_LAYER, "cross_entropy") for name in reads) and stage.targets is None:
        return
    coming = layer_short_name(recipe.capture) if asked.builds else None
    if coming is not None and (stage.targets is None or f"{stage.targets}-".startswith(f"{coming}-")):
        return
    if asked.plans_only and not asked.caches and stage.targets and LAYER_NAME.fullmatch(stage.targets):
        return  # a layer that another command builds before
    for path in asked.caches or recipe.cache:
        layers = list_layers(path)
        chosen: str | LayerView | None = stage.targets or layer_of_capture(recipe)
        name = chosen.name if isinstance(chosen, LayerView) else chosen
        if not layers:
            yield ("targets",), f"{path} has no targets layer (or is no cache yet); build it with `decant teach`"
            continue
        try:
            layer = choose_layer(layers, name, path)
        except DecantError as error:
            yield ("targets",), str(error)
            continue
        assert layer is not None
        for j, loss in enumerate(stage.losses):
            missing = sorted(set(loss.temperature.extremes()) - set(layer.identity.temperatures))
            if missing and loss.name not in (*LOSSES_ON_HIDDEN_LAYER, "cross_entropy"):
                have = ", ".join(f"{value:g}" for value in layer.identity.temperatures)
                sentence = f"temperature {missing[0]:g} is not in layer {layer.full_name}, only {have}; capture it"
                yield ("losses", j, "temperature"), sentence


def _trainer(asked: Asked, trainer: StageTrainer) -> Iterator[Problem]:
    """Check names that transformers gives, and packages."""
    for name in trainer.report_to:
        is_default = "report_to" not in trainer.model_fields_set
        if asked.elsewhere or (asked.plans_only and is_default):
            continue
        if name != "none" and importlib.util.find_spec(name) is None:
            yield ("report_to",), f"'{name}' is not installed here; install it, or leave it out"
    needed = OPTIMIZERS[trainer.optim].package
    if needed is not None and not asked.plans_only and importlib.util.find_spec(needed) is None:
        how = "install it (decant-kd[gpu] has bitsandbytes), or use adamw_torch"
        yield ("optim",), f"'{trainer.optim}' needs the package {needed}; {how}"


def _evaluation(asked: Asked) -> Iterator[Problem]:
    """Check models, tasks and prompts of the comparison."""
    from tools.evaluate.questions import read_questions
    from tools.evaluate.tasks import task_kind

    recipe = asked.recipe
    for i, model in enumerate(recipe.evaluate.models):
        if model == "base" and recipe.student is not None and recipe.student.init == "random":
            sentence = (
                "the student starts from random weights (init: random), so there is nothing to compare; leave it out"
            )
            yield ("evaluate", "models", i), sentence
    if asked.elsewhere:
        return
    for i, task in enumerate(recipe.evaluate.tasks):
        yield from _said(
            ("evaluate", "tasks", i, "path"),
            lambda task=task: read_questions(task, task_kind(task)),  # type: ignore[misc]
        )
    for i, name in enumerate(recipe.evaluate.side_by_side.prompts if recipe.evaluate.side_by_side else ()):
        if name not in ("heldout", "tasks") and not Path(name).is_file():
            yield ("evaluate", "side_by_side", "prompts", i), f"there is no file '{name}'; correct the path"


CHECKS: tuple[tuple[str, Callable[[Asked], Iterator[Problem]]], ...] = (
    ("any", _places),
    ("teach", _teacher),
    ("teach", _prompts),
    ("train", _student),
    ("train", _stages),
    ("eval", _evaluation),
)
"""Which phase needs which check."""
