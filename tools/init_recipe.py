"""`decant init`: a starter recipe for the user's own models and data, with comments, that validates as it is.

The text is a template; names are quoted and escaped where they need it, so any path is safe, also in the commands that
it names. The format of the prompts is that which reads the columns of their first row, whatever kind of file holds it;
where none does, the recipe says so.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from shared.errors import PromptError, UsageError, refused
from shared.models.gpus import list_gpus
from shared.recipe.base import SLUG
from shared.recipe.sections.prompts import COLUMNS, PromptSource
from shared.recipe.yaml_text import columns_text, yaml_text
from shared.text.file_endings import endings

_HEAD = """\
# {name}: {teacher} into {student}.
#
# Run-book
#   decant doctor                 what this machine can do
#   decant plan {path}            rows, tokens, gigabytes before anything runs
#   decant teach {path}           phase 1: the teacher answers and scores -> {output}/cache
#   decant cache show {output}/cache
#   decant train {path}           phase 2: the student's stages
#   decant eval {path}            every model side by side
#   decant report {output}
# Every command continues what is there. `--set stages.kd.trainer.max_steps=10` changes a value for one call.
"""
_TEACHER = """\
teacher:
  model: {teacher}          # a directory or a hub id
  engine: vllm                    # or transformers, the slow reference
  dtype: bfloat16
  # max_model_len: 4096           # longest prompt and answer together, in tokens
  # tensor_parallel_size: 2       # GPUs that share one copy

prompts:                          # one entry per source; mixtures and reports use the source's name
  - {{source: main, path: {prompts}, format: {format}}}{note}
  # formats: {formats}; limit: 1000 takes the first rows only

{generate}
capture:
  mode: top                       # top | sample | top+sample; {{mode: sample, draws: 12}} is enough for forward_kl
  k: 64                           # most probable tokens per position; the rest is kept as one exact mass
  mass: 0.999                     # stop earlier once this much probability is covered
  temperatures: [1.0]             # every temperature that a loss will use

"""
_TEMPLATE = """\
{head}
name: {name}
output_dir: {output}
seed: 0

{teacher}cache: {cache}

heldout: {{fraction: {fraction}}}         # prompts that no stage trains on

student:
  model: {student}          # a directory or a hub id, with the {whose}'s tokenizer
  init: pretrained                # or random: fresh weights from its config
  adapter: none                   # none | lora | qlora, or {{kind: lora, r: 16}}
  dtype: float32                  # masters in float32 keep small updates; compute type is trainer.bf16

stages:
  - name: kd
    init_from: base               # base | previous | an earlier stage | a directory
{targets}    losses:                       # they are added; each weight and temperature is a number or a schedule
{losses}    trainer:                      # the names of transformers.TrainingArguments
      learning_rate: 1e-4
      num_train_epochs: 1         # or max_steps
      pack_tokens: 2048
      gradient_accumulation_steps: 4
      bf16: {bf16}

evaluate:
  models: {models}
  tasks: []                       # such as {{name: gsm8k, path: data/math.test.jsonl}}
"""
_LOSSES = """\
      - {name: forward_kl, weight: 0.9, temperature: 1.0}
      - {name: cross_entropy, weight: 0.1}
"""


OLDEST_WITH_BFLOAT16 = (8, 0)
"""Compute capability from which on tensor cores multiply bfloat16."""
_GENERATE = """generate:                         # leave this section out to score the answers that the data has
  temperature: 1.0
  max_new_tokens: 512
"""
_WHOLE_FILE = 'each file is one text; for a prompt in each line, write .jsonl: {"prompt": "..."}'
_TEXTS = "# plain texts are scored as they are: there is no `generate` section\n"


def init_recipe(name: str, teacher: str, student: str, prompts: str, output: Path | None = None) -> Path:
    """Write a starter recipe and return its path.

    Raises:
        UsageError: the name cannot be a directory's, or the file exists.
    """
    place = place_of(name, output)
    format_name, columns, note = guess_format(prompts)
    run = f"runs/{name}"
    head = _HEAD.format(
        name=name, teacher=plain_text(teacher), student=plain_text(student), path=word_of(place), output=run
    )
    section = _TEACHER.format(
        teacher=yaml_text(teacher),
        prompts=yaml_text(prompts),
        format=format_name + (f", columns: {columns_text(columns)}" if columns else ""),
        formats=" | ".join(COLUMNS),
        note=f"\n  # {note}" if note else "",
        generate=_TEXTS if format_name == "text" else _GENERATE,
    )
    write_starter(
        place,
        name,
        student,
        head=head,
        teacher=section,
        cache=f"{run}/cache",
        fraction=0.05,
        whose="teacher",
        targets="",
        losses=_LOSSES,
        models="[teacher, base, kd]",
    )
    return place


def place_of(name: str, output: Path | None) -> Path:
    """Return where the starter of an experiment is to be written.

    Raises:
        UsageError: the name cannot be an experiment's.
    """
    if not re.match(SLUG, name) or len(name) > 100:
        raise UsageError(
            f"'{name}' cannot name an experiment; write letters, digits, '.', '_' and '-', and begin with a letter "
            "or digit"
        )
    return output or Path("recipes") / f"{name}.yaml"


def write_starter(path: Path, name: str, student: str, **values: object) -> None:
    """Write a starter where no file is; `values` fill the places of the template that the two kinds fill differently.

    Raises:
        UsageError: the file exists or cannot be written.
    """
    text = _TEMPLATE.format(
        name=yaml_text(name), output=f"runs/{name}", student=yaml_text(student), bf16=_computing(), **values
    )
    created = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            created = True
            file.write(text)
    except OSError as error:
        if created:
            path.unlink(missing_ok=True)
        elif path.exists():
            raise UsageError(f"{path} exists already; choose another name, or --output") from None
        raise UsageError(f"{path} cannot be written ({refused(error)}), or name another file with --output") from None


def _computing() -> str:
    """Return the value of `bf16` for this machine, and why in a comment."""
    gpus = list_gpus()
    if not gpus:
        return (
            "false                 # no GPU was found here; true on one computes in bfloat16, weights stay in float32"
        )
    name, capability = min(gpus, key=lambda gpu: gpu[1])
    if capability < OLDEST_WITH_BFLOAT16:
        return f"false                 # {plain_text(name)} has no tensor cores for bfloat16; float16 is fp16: true"
    return f"true                  # for {plain_text(name)}, found here: bfloat16 products, weights stay in float32"


def guess_format(prompts: str) -> tuple[str, dict[str, str], str]:
    """Return the format that reads the first row of local prompts, its `columns`, and a note where there is one to say.

    A file, glob or directory as a recipe may name it. What cannot be read, and a data set of the hub, is taken for
    `messages`: `decant plan` says what is wrong with it.

    >>> guess_format("no/such/file.jsonl")
    ('messages', {}, '')
    """
    from teacher_cache.prompts.files.prompt_directories import LocalFiles
    from teacher_cache.prompts.files.prompt_files import locate
    from teacher_cache.prompts.files.prompt_readers import read_file
    from teacher_cache.prompts.formats.likely_format import likely_format

    try:
        place = locate(PromptSource(source="main", path=prompts, format="text")) if _is_local(prompts) else None
        _, row = next(read_file(place.paths[0])) if isinstance(place, LocalFiles) else (0, None)
        row = json.loads(row.removeprefix("\ufeff")) if isinstance(row, str) else row
    except (PromptError, ValueError, OSError, StopIteration, RecursionError):
        return "messages", {}, ""
    if not isinstance(row, dict):
        return "messages", {}, ""
    found = likely_format(row)
    if found is not None:
        return *found, _WHOLE_FILE if isinstance(place, LocalFiles) and ".txt" in endings(place.paths[0]) else ""
    names = plain_text(", ".join(map(str, row)))[:80]
    note = f"a guess: the first row has the columns {names}; docs/data.md says how `columns` names them"
    return "messages", {}, note


def _is_local(prompts: str) -> bool:
    """Say whether something on this machine has the name; a glob may have."""
    try:
        return any(character in prompts for character in "*?[") or Path(prompts).exists()
    except (OSError, ValueError):
        return False


def plain_text(text: str) -> str:
    """Keep a name within one line of comment."""
    return "".join(character if character.isprintable() else "?" for character in text)


def word_of(path: object) -> str:
    """Write a path as one word of a command within a comment."""
    return plain_text(shlex.quote(str(path)))
