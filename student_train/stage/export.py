"""A trained student as a plain model directory that transformers and vLLM load.

Adapters are merged and also kept by themselves. The directory is written under a temporary name, synced and renamed, so
it is whole or absent. Tokenizer, chat template and end tokens are those that the student was trained with, whether they
are the tokenizer's own or the recipe's (shared/cache/chat_settings.py).
Cost: the size of the model, once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.atomic import fsync_dir
from shared.cache.chat_settings import ChatSettings, write_chat_settings
from shared.models.end_tokens import checked_ids, end_token_ids
from shared.models.files import load_tokenizer
from shared.models.weights.loading import load_causal_lm
from shared.process.failpoints import failpoint
from shared.recipe.recipe import Student
from student_train.records.checkpoints import fsync_tree

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a tokenizer may consist of."""


def export_student(
    model: Any,
    student: Student,
    start: str,
    tokenizer_dir: Path,
    stage_dir: Path,
    settings: Callable[[Any], ChatSettings],
) -> Path:
    """Write `model` and, where there is one, `adapter` below a stage's directory; return the model's directory.

    Args:
        model: the trained student, with or without adapter; an adapter is merged into it.
        student: the recipe's section.
        start: directory or hub id that the student was loaded from, to merge into where its own weights are in 4 bits.
        tokenizer_dir: tokenizer and chat template of the cache.
        stage_dir: directory of the stage.
        settings: says for that tokenizer which chat template and end tokens the student was trained with.
    """
    if not student.adapter.trains_all_weights:
        adapted = model
        _write(stage_dir / "adapter", lambda path: adapted.save_pretrained(path))
        if student.adapter.holds_4_bits:
            model = _merged_from_disk(student, start, stage_dir / "adapter")
        else:
            model = model.merge_and_unload()
    tokenizer = set_generation(model, tokenizer_dir)

    def save(path: Path) -> None:
        model.save_pretrained(path)
        copy_tokenizer(tokenizer_dir, path)
        write_chat_settings(path, settings(tokenizer), tokenizer)

    target = stage_dir / "model"
    failpoint("export.before_write")
    _write(target, save)
    failpoint("export.after_write")
    return target


def _merged_from_disk(student: Student, start: str, adapter_dir: Path) -> Any:
    """Return the unquantised start model with the adapter merged: merging into 4-bit weights would round once more."""
    from student_train.student.student import DTYPES

    return load_causal_lm(
        start,
        what="the student",
        revision=None if Path(start).is_dir() else student.revision,
        trust_remote_code=student.trust_remote_code,
        adapter=adapter_dir,
        dtype=DTYPES[student.dtype],
    )


def set_generation(model: Any, tokenizer_dir: Path) -> Any:
    """Give a model the end and padding tokens of the cache's tokenizer and its cache back; return the tokenizer."""
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(tokenizer_dir, trust_remote_code=False)
    model.config.use_cache = True
    generation = getattr(model, "generation_config", None) or GenerationConfig()
    ends = end_token_ids(tokenizer, checked_ids(generation.eos_token_id, "eos_token_id of the student"))
    if ends:
        generation.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
        model.config.eos_token_id = ends[0]
    if tokenizer.pad_token_id is not None:
        generation.pad_token_id = tokenizer.pad_token_id
    generation.use_cache = True
    model.generation_config = generation
    make_savable(model)
    return tokenizer


def make_savable(model: Any) -> None:
    """Let settings of sampling say `do_sample`: without it transformers reads them and refuses to save them."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


def copy_tokenizer(tokenizer_dir: Path, model_dir: Path) -> None:
    """Copy a tokenizer's files beside a model's."""
    for path in (
        *map(tokenizer_dir.joinpath, TOKENIZER_FILES),
        *tokenizer_dir.glob("additional_chat_templates/*.jinja"),
    ):
        if path.is_file():
            copied = model_dir / path.relative_to(tokenizer_dir)
            copied.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copied)
    config = model_dir / "tokenizer_config.json"
    if not config.exists():
        config.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def _write(target: Path, save: Any) -> None:
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    save(partial)
    fsync_tree(partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    fsync_dir(target.parent)
