"""`decant init`: a starter recipe for the user's own models and data, with comments, that validates as it is.

The text is a template; names are quoted and escaped where they need it, so any path is safe. The format of the prompts
is guessed from the first row of a local jsonl file and said to be a guess.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from shared.errors import UsageError
from shared.recipe.base import SLUG

_TEMPLATE = """\
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

name: {name_value}
output_dir: {output}
seed: 0

teacher:
  model: {teacher_value}          # a directory or a hub id
  engine: vllm                    # or transformers, the slow reference
  dtype: bfloat16
  # max_model_len: 4096           # longest prompt and answer together, in tokens
  # tensor_parallel_size: 2       # GPUs that share one copy

prompts:                          # one entry per source; mixtures and reports use the source's name
  - {{source: main, path: {prompts_value}, format: {format}}}
  # formats: messages | prompt_completion | alpaca | sharegpt | text | cache; limit: 1000 takes the first rows only

generate:                         # leave this section out to score the answers that the data has
  temperature: 1.0
  max_new_tokens: 512

capture:
  mode: top                       # top | sample | top+sample; {{mode: sample, draws: 12}} is enough for forward_kl
  k: 64                           # most probable tokens per position; the rest is kept as one exact mass
  mass: 0.999                     # stop earlier once this much probability is covered
  temperatures: [1.0]             # every temperature that a loss will use

cache: {output}/cache

heldout: {{fraction: 0.05}}         # prompts that no stage trains on

student:
  model: {student_value}          # a directory or a hub id, with the teacher's tokenizer
  init: pretrained                # or random: fresh weights from its config
  adapter: none                   # none | lora | qlora, or {{kind: lora, r: 16}}
  dtype: float32                  # masters in float32 keep small updates; compute type is trainer.bf16

stages:
  - name: kd
    init_from: base               # base | previous | an earlier stage | a directory
    losses:                       # they are added; each weight and temperature is a number or a schedule
      - {{name: forward_kl, weight: 0.9, temperature: 1.0}}
      - {{name: cross_entropy, weight: 0.1}}
    trainer:                      # the names of transformers.TrainingArguments
      learning_rate: 1e-4
      num_train_epochs: 1         # or max_steps
      pack_tokens: 2048
      gradient_accumulation_steps: 4
      bf16: false                 # true on a GPU that has it

evaluate:
  models: [teacher, base, kd]
  tasks: []                       # such as {{name: gsm8k, path: data/math.test.jsonl}}
"""


def init_recipe(name: str, teacher: str, student: str, prompts: str, output: Path | None = None) -> Path:
    """Write a starter recipe and return its path.

    Raises:
        UsageError: the name cannot be a directory's, or the file exists.
    """
    if not re.match(SLUG, name) or len(name) > 100:
        raise UsageError(
            f"'{name}' cannot name an experiment; write letters, digits, '.', '_' and '-', and begin with a letter "
            "or digit"
        )
    path = output or Path("recipes") / f"{name}.yaml"
    text = _TEMPLATE.format(
        name=name,
        name_value=_value(name),
        path=path,
        output=f"runs/{name}",
        teacher=_plain(teacher),
        student=_plain(student),
        teacher_value=_value(teacher),
        student_value=_value(student),
        prompts_value=_value(prompts),
        format=guess_format(Path(prompts)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path} exists already; choose another name, or --output") from None
    return path


def guess_format(path: Path) -> str:
    """Guess the format of prompts from the columns of a jsonl file's first row; messages where nothing is known."""
    try:
        with path.open("rb") as file:
            row = json.loads(file.readline(1 << 20))
    except (OSError, ValueError):
        return "messages"
    columns = set(row) if isinstance(row, dict) else set()
    for format_name, wanted in (
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("alpaca", {"instruction"}),
        ("prompt_completion", {"prompt"}),
        ("text", {"text"}),
    ):
        if wanted <= columns:
            return format_name
    return "messages"


def _plain(text: str) -> str:
    """Keep a name within one line of comment."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _value(text: str) -> str:
    """Write a text as a YAML scalar: plain where that is safe, in double quotes elsewhere."""
    plain = re.fullmatch(r"[A-Za-z/][\w./-]*", text, re.ASCII) and text.lower() not in ("true", "false", "null")
    return text if plain else '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    """Write a character within double quotes of YAML."""
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08x}"
