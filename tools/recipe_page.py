"""`docs/recipe.md` and the JSON schema for editors, made from the sections themselves, so that they cannot lag behind.

One heading a section, in the order in which a recipe meets them: what it says, an example that loads, and a table of
its keys with type, default and meaning. Cost: milliseconds.
"""

from __future__ import annotations

import json
import types
import typing
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from shared.recipe.file import recipe_json_schema
from shared.recipe.recipe import Recipe
from shared.recipe.schedule import Schedule

HEAD = """# The recipe, key by key

Made by `decant schema --page` from the program's own schema; do not edit it. One YAML 1.2 file per experiment. Unknown
keys are refused with file, line and a suggestion; `--set path.to.key=value` overrides one, such as
`--set stages.kd.trainer.max_steps=800`. Paths are relative to the directory in which the command runs;
`~/` begins your home directory.

A file whose first line is `# yaml-language-server: $schema=PATH/recipe.schema.json` is completed and checked by editors
that know YAML schemas; the schema lies beside this page.
"""
EXAMPLES = {
    "VllmTeacher": "teacher: {model: Qwen/Qwen3-8B, dtype: bfloat16, tensor_parallel_size: 2}",
    "TransformersTeacher": "teacher: {model: Qwen/Qwen3-8B, engine: transformers, batch_tokens: 8192}",
    "ServedTeacher": 'teacher: {model: Qwen/Qwen3-8B, engine: server, servers: ["http://127.0.0.1:8000/v1"]}',
    "Workers": "teacher: {model: Qwen/Qwen3-8B, workers: {backend: ray, count: 4, gpus_per_engine: 1}}",
    "PromptSource": "prompts: [{source: math, path: prompts.jsonl, format: messages}]",
    "Generate": "generate: {temperature: 0.8, top_p: 0.95, max_new_tokens: 1024, samples_per_prompt: 2}",
    "TopCapture": "capture: {k: 64, mass: 0.999, temperatures: [1.0, 2.0]}",
    "SampleCapture": "capture: {mode: sample, draws: 12}",
    "TopSampleCapture": "capture: {mode: top+sample, k: 32, draws: 32, temperatures: [1.0, 2.0]}",
    "HiddenCapture": "capture: {hidden: {layers: [6, 12, final], pooled: mean}}",
    "AttentionCapture": "capture: {hidden: {attention: {layers: [6, 12], strongest: 16}}}",
    "Heldout": "heldout: {fraction: 0.05}",
    "Student": "student: {model: Qwen/Qwen3-0.6B, dtype: float32, gradient_checkpointing: auto}",
    "Adapter": "student: {model: Qwen/Qwen3-4B, adapter: {kind: qlora, r: 32, alpha: 64}}",
    "Stage": "stages: [{name: kd, losses: [{name: forward_kl}], trainer: {learning_rate: 1e-4, max_steps: 1000}}]",
    "TargetLayer": "targets: [{layer: math, sources: [math]}, {layer: code, weight: 0.5, sources: [code, ops]}]",
    "StageTrainer": "trainer: {learning_rate: 1e-4, max_steps: 1000, pack_tokens: 4096, bf16: true}",
    "Schedule": "weight: {kind: linear, start: 0.5, end: 0.1}     # or a plain number",
    "CrossEntropy": "losses: [{name: cross_entropy, weight: 0.1}]",
    "Divergence": "losses: [{name: forward_kl, weight: 0.9, temperature: 2.0}]",
    "JensenShannon": "losses: [{name: jsd, beta: 0.1}]",
    "SkewKL": "losses: [{name: skew_forward_kl, skew: 0.1}]",
    "HiddenStates": "losses: [{name: forward_kl}, {name: hidden, weight: 0.1, layer_map: {12: 6}}]",
    "Attention": "losses: [{name: forward_kl}, {name: attention, weight: 0.1}]",
    "Contrastive": "losses: [{name: forward_kl}, {name: contrastive, weight: 0.1, tau: 0.05}]",
    "Balance": "balance: {kind: grad_norm, every_steps: 10}",
    "Sampling": "sampling: {kind: evaluation, floor: 0.1}          # beside `evaluate`",
    "StageEvaluation": "evaluate: {every_steps: 100, samples: 4, early_stopping: {patience: 3}, keep_best: true}",
    "EarlyStopping": "evaluate: {every_steps: 100, early_stopping: {patience: 3, min_delta_nats: 0.001}}",
    "Evaluate": "evaluate: {models: [teacher, base, kd], engine: vllm, tasks: [{name: gsm8k, path: test.jsonl}]}",
    "Task": "evaluate: {tasks: [{name: gsm8k, path: test.jsonl, temperature: 0.6, samples: 4}]}",
    "SideBySide": "evaluate: {side_by_side: {size: medium, temperatures: [0.1, 0.7]}}",
    "Assume": "assume: {sources: {math: {rows: 7473, prompt_tokens: 60, answer_tokens: 150}}}",
}
"""An example of each section, in the place where it stands."""


def page() -> str:
    """Return docs/recipe.md."""
    parts = [HEAD, *_section(Recipe)]
    seen: set[type[BaseModel]] = {Recipe}
    queue: list[type[BaseModel]] = [Recipe]
    while queue:
        for below in _below(queue.pop(0)):
            if below not in seen:
                seen.add(below)
                queue.append(below)
                parts += _section(below)
    return "\n".join(parts)


def schema_text() -> str:
    """Return docs/recipe.schema.json."""
    return json.dumps(recipe_json_schema(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _section(section: type[BaseModel]) -> list[str]:
    title = "The file itself" if section is Recipe else section.__name__
    example = EXAMPLES.get(section.__name__)
    lines = [f"## {title}", "", " ".join((section.__doc__ or "").split()), ""]
    lines += [f"    {example}", ""] if example else []
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {meaning} |")
    return [*lines, ""]


def _default(field: Any) -> str:
    if field.is_required():
        return "**needed**"
    default = field.get_default(call_default_factory=True)
    if default is None or default is PydanticUndefined:
        return ""
    value = to_jsonable_python(default)
    if isinstance(default, BaseModel) and not isinstance(default, Schedule):
        return "see below"
    return f"`{json.dumps(value)}`"


def _type(annotation: Any) -> str:
    """Return a type in words: `integer`, `text`, `list of Loss`, `one of a, b`."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is types.NoneType:
        return "null"
    if origin is typing.Literal:
        return "one of " + ", ".join(f"`{json.dumps(part).strip(chr(34))}`" for part in parts)
    if origin is typing.Annotated:
        return _type(parts[0])
    if origin in (typing.Union, types.UnionType):
        said = list(dict.fromkeys(_type(part) for part in parts if part is not types.NoneType))
        return " or ".join(said)
    if origin in (tuple, list):
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return f"mapping of {_type(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    plain = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path", date: "date"}
    return plain.get(annotation, "anything")


def _below(section: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the sections inside a section, in the order of its keys."""

    def inside(annotation: Any) -> list[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [annotation]
        return [found for part in typing.get_args(annotation) for found in inside(part)]

    return [found for field in section.model_fields.values() for found in inside(field.annotation)]
