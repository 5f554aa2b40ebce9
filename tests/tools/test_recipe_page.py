"""docs/recipe.md and the schema for editors are those of the program, and their examples load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML, YAMLError

from shared.recipe.recipe import Recipe, Stage
from tools.recipe_page import EXAMPLES, page, schema_text

ROOT = Path(__file__).resolve().parents[2]


def test_page_and_schema_are_current() -> None:
    for name, text in (("recipe.md", page()), ("recipe.schema.json", schema_text())):
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"docs/{name} is old; run `make docs`"


def test_every_key_of_every_section_is_on_the_page() -> None:
    said = page()
    assert said.count("**needed**") > 5
    for key in ("draws", "pack_tokens", "layer_map", "tensor_parallel_size", "early_stopping", "beta", "supervise"):
        assert f"| `{key}` |" in said


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_of_a_section_loads(name: str, tmp_path: Path) -> None:
    example: dict[str, Any] = YAML(typ="safe", pure=True).load(EXAMPLES[name])
    (key,) = example
    stage: dict[str, Any] = {"name": "kd", "losses": [{"name": "forward_kl"}]}
    recipe: dict[str, Any] = {"name": "x", "output_dir": "out", "cache": "cache", "teacher": {"model": "m"}}
    recipe |= {"prompts": [{"source": "math", "path": "p.jsonl", "format": "messages"}], "student": {"model": "s"}}
    if key == "weight":
        stage["losses"][0] |= example
    elif key in Stage.model_fields and (key not in Recipe.model_fields or "every_steps" in example[key]):
        stage |= example
    else:
        recipe |= example
    if key == "balance":
        stage["losses"].append({"name": "cross_entropy"})
    if key == "sampling":
        stage["evaluate"] = {"every_steps": 10}
    recipe.setdefault("stages", [stage])
    if name == "Divergence" or key == "losses":
        recipe["capture"] = {"temperatures": [2.0]}
    loaded = Recipe.model_validate(recipe)
    assert loaded.stages


def test_the_schema_takes_a_kind_with_its_own_options_as_the_program_does() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    sections: list[tuple[str, dict[str, Any], bool]] = [
        ("capture", {}, True),
        ("capture", {"k": 8, "mass": 0.9}, True),
        ("capture", {"mode": "sample", "draws": 12}, True),
        ("capture", {"mode": "top+sample", "draws": 12, "label": "head"}, True),
        ("capture", {"draws": 12}, False),
        ("capture", {"mode": "top", "draws": 0}, False),
        ("capture", {"mode": "sample"}, False),
        ("capture", {"mode": "sample", "draws": 12, "k": 0}, False),
        ("capture", {"mode": "top+sample"}, False),
        ("teacher", {}, True),
        ("teacher", {"tensor_parallel_size": 2, "quantization": "fp8"}, True),
        ("teacher", {"engine": "transformers", "batch_tokens": 8}, True),
        ("teacher", {"engine": "server", "servers": ["http://a/v1"], "server_requests": 8}, True),
        ("teacher", {"servers": ["http://a/v1"]}, False),
        ("teacher", {"engine": "transformers", "quantization": None}, False),
        ("teacher", {"engine": "server"}, False),
        ("teacher", {"engine": "server", "servers": ["http://a/v1"], "workers": None}, False),
    ]
    schema = jsonschema.Draft202012Validator(json.loads(schema_text()))
    for key, options, is_right in sections:
        document = {"name": "x", "output_dir": "out", "cache": "cache", key: options}
        if key == "teacher":
            document[key] = {"model": "m", **options}
        assert schema.is_valid(document) == is_right, document
        assert _loads(document) == is_right, document


def _loads(document: dict[str, Any]) -> bool:
    try:
        Recipe.model_validate(document)
    except ValidationError:
        return False
    return True


@pytest.mark.slow
def test_the_schema_accepts_every_recipe_of_the_project_and_refuses_an_unknown_key() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(schema_text())
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        assert path.read_text().startswith("# yaml-language-server: $schema=../docs/recipe.schema.json\n"), path
        document = json.loads(json.dumps(YAML(typ="safe", pure=True).load(path.read_text())))
        jsonschema.validate(document, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**document, "unknown_key": 1}, schema)


def blocks() -> list[Any]:
    """Return every block of YAML of README and docs with its place."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        found += [
            pytest.param(match[1], id=f"{path.name}:{text[: match.start()].count(chr(10)) + 1}")
            for match in re.finditer(r"```yaml\n(.*?)```", text, re.DOTALL)
        ]
    return found


@pytest.mark.parametrize("block", blocks())
def test_every_example_of_a_page_is_part_of_a_recipe_that_loads(block: str) -> None:
    block = re.sub(r"\n *\.\.\.$", "", block, flags=re.MULTILINE)
    try:
        examples = [YAML(typ="safe").load(block)]
    except YAMLError:  # lines of which each is an example of one key
        examples = [YAML(typ="safe").load(line) for line in block.splitlines()]
    for example in examples:
        stage: dict[str, Any] = {"name": "kd", "losses": [{"name": "forward_kl"}]}
        recipe = {"name": "a", "output_dir": "a", "cache": "a", "teacher": {"model": "a"}, "student": {"model": "a"}}
        recipe |= {"prompts": [{"source": "a", "path": "a.jsonl", "format": "messages"}], "stages": [stage]}
        if "server" not in block:  # which has no tails at other temperatures
            recipe["capture"] = {"temperatures": [1, 2, 4]}
        whole = {key for key in example if key in Recipe.model_fields and "every_steps" not in (example[key] or ())}
        recipe |= {key: example[key] for key in whole}
        for number, one in enumerate(recipe["stages"]):
            one.setdefault("name", f"stage-{number}")
            one.setdefault("losses", stage["losses"])
        for key in example.keys() - whole:
            (stage if key in Stage.model_fields else stage["losses"][0])[key] = example[key]
        if "evaluate" in whole:
            recipe["evaluate"].setdefault("models", ["teacher", "base", "kd"])
        assert Recipe.model_validate(recipe).model_fields_set >= whole
