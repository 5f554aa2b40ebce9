"""Wrong input through the program itself: one clear sentence, exit code 1 or 2, and never a cache that looks whole but
is not.
"""

from __future__ import annotations

import json
import re
import resource
import shlex
import signal
from pathlib import Path

import pytest

from shared.cache.cache import Cache
from shared.errors import CacheError
from tests.system.program import write_lines
from tests.tiny_models import make_qwen3
from tools import cli

RECIPE = """\
name: wrong
output_dir: run
teacher: {model: teacher, engine: transformers, dtype: float32, max_model_len: 96}
prompts: [{source: a, path: prompts.jsonl, format: messages}]
generate: {max_new_tokens: 6}
capture: {k: 8}
cache: run/cache
rows_per_part: 4
student: {model: student}
stages: [{name: kd, losses: [{name: forward_kl}], trainer: {max_steps: 2, pack_tokens: 128}}]
"""

UNSPLITTABLE = "{% for m in messages %}{{ m['content'] }}{{ '.' * (messages|length) }}{% endfor %}{{ eos_token }}"


def questions(count: int) -> list[dict]:
    return [{"messages": [{"role": "user", "content": f"How many are {i} and {i}?"}]} for i in range(count)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("models")
    make_qwen3(place / "teacher", seed=0, num_layers=1)
    make_qwen3(place / "student", seed=1, num_layers=1)
    return place


@pytest.fixture
def place(tmp_path, models, monkeypatch) -> Path:
    for name in ("teacher", "student"):
        (tmp_path / name).symlink_to(models / name)
    write_lines(tmp_path / "prompts.jsonl", questions(8))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *words: str) -> tuple[int, str, str]:
    """Return exit code, output and the one error sentence ('' where there is none)."""
    capsys.readouterr()
    code = cli.main([*words])
    seen = capsys.readouterr()
    assert "Traceback" not in seen.err
    lines = [line for line in seen.err.splitlines() if line.startswith("decant: error: ")]
    assert len(lines) == (code != 0), seen.err
    return code, seen.out, lines[0] if lines else ""


def no_cache(place: Path) -> bool:
    """Tell whether nothing is there that a reader would take for a cache with rows."""
    if not (place / "run" / "cache" / "cache.json").exists():
        return True
    try:
        return len(Cache.open(place / "run" / "cache")) == 0
    except CacheError:
        return True


def test_unknown_key_names_line_and_suggestion(place, capsys):
    (place / "recipe.yaml").write_text(RECIPE.replace("capture:", "captur:"))
    code, _, error = run(capsys, "teach", "recipe.yaml")
    assert code == 2 and "recipe.yaml:6" in error and "did you mean 'capture'?" in error and no_cache(place)


def test_missing_recipe_and_missing_prompts_are_named(place, capsys):
    code, _, error = run(capsys, "teach", "nowhere.yaml")
    assert code == 2 and "nowhere.yaml" in error
    (place / "prompts.jsonl").unlink()
    code, _, error = run(capsys, "teach", "recipe.yaml")
    assert code == 2 and "recipe.yaml:4: prompts.0.path: prompts.jsonl" in error and no_cache(place)


def test_malformed_line_is_named_by_its_number(place, capsys):
    lines = (place / "prompts.jsonl").read_text().splitlines()
    lines[4] = lines[4][:-3]
    (place / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    code, _, error = run(capsys, "teach", "recipe.yaml")
    assert code == 1 and "prompts.jsonl:5" in error and no_cache(place)


def test_empty_data_set_is_refused(place, capsys):
    (place / "prompts.jsonl").write_text("")
    code, _, error = run(capsys, "teach", "recipe.yaml")
    assert code == 1 and "prompts.jsonl" in error and no_cache(place)


def test_template_that_cannot_be_split_is_refused_with_its_line(place, capsys):
    talk = [{"role": role, "content": f"{role} says {i}"} for i in range(2) for role in ("user", "assistant")]
    write_lines(place / "prompts.jsonl", [{"messages": talk}])
    recipe = RECIPE.replace("generate: {max_new_tokens: 6}\n", "")
    recipe = recipe.replace("format: messages}", f"format: messages, chat_template: {json.dumps(UNSPLITTABLE)}}}")
    (place / "recipe.yaml").write_text(recipe)
    code, _, error = run(capsys, "teach", "recipe.yaml")
    assert code == 1 and "template" in error and no_cache(place)


def test_prompt_longer_than_the_model_is_set_aside_and_counted(place, capsys):
    long = {"messages": [{"role": "user", "content": "How many? " * 60}]}
    write_lines(place / "prompts.jsonl", [*questions(7), long])
    code, out, _ = run(capsys, "teach", "recipe.yaml", "--max-set-aside", "0.5")
    assert code == 0 and "prompts.jsonl:8" in out
    assert len(Cache.open(place / "run" / "cache")) == 7
    code, _, error = run(capsys, "teach", "recipe.yaml")
    assert code == 1 and "1 of 8" in error


@pytest.fixture
def built(place, capsys) -> Path:
    assert run(capsys, "teach", "recipe.yaml")[0] == 0
    return place


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "altered"])
@pytest.mark.parametrize("kind", ["sequences", "targets"])
def test_damaged_part_is_named_by_verify_and_training(built, capsys, damage, kind):
    part = sorted((built / "run" / "cache" / kind).rglob("part-*.arrow"))[-1]
    data = bytearray(part.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 0x10
    part.chmod(0o644)
    part.write_bytes(bytes(data))
    assert cli.main(["cache", "verify", "run/cache"]) == 1
    assert part.name in capsys.readouterr().out
    code, _, error = run(capsys, "train", "recipe.yaml")
    assert code == 1 and part.name in error
    assert not (built / "run" / "train" / "kd" / "model").exists()


def test_student_of_another_tokenizer_is_refused_with_both(built, capsys, tmp_path_factory):
    from transformers import AutoTokenizer

    other = make_qwen3(tmp_path_factory.mktemp("other") / "student", seed=2, num_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<one-more>"])
    tokenizer.save_pretrained(other)
    code, _, error = run(capsys, "train", "recipe.yaml", "--set", f"student.model={other}")
    assert code == 2 and "student.model" in error and "has tokenizer" in error
    names = {"OUT": "tr", "NAME": "small"}
    for advice in re.findall("`decant (cache translate .*?|init .*?)`", error):
        assert run(capsys, *(names.get(word, word) for word in shlex.split(advice)))[0] == 0
    _, _, error = run(capsys, "plan", "recipes/small.yaml")
    assert "513 tokens" in error  # its head has a row too few; the tokenizer is right


def test_temperature_that_was_not_captured_is_refused_before_and_after_the_build(built, capsys):
    code, _, error = run(capsys, "train", "recipe.yaml", "--set", "stages.kd.losses.0.temperature=2.0")
    assert code == 2 and "temperature 2 is not captured" in error
    (built / "reuse.yaml").write_text(
        "name: reuse\noutput_dir: run2\ncache: run/cache\nstudent: {model: student}\n"
        "stages: [{name: kd, losses: [{name: forward_kl, temperature: 2.0}], trainer: {max_steps: 2, pack_tokens: "
        "128}}]\n"
    )
    code, _, error = run(capsys, "train", "reuse.yaml")
    assert code == 2 and "temperature 2 is not in layer" in error


def test_adapter_on_the_head_is_refused(built, capsys):
    adapter = "student.adapter={kind: lora, target_modules: [lm_head]}"
    code, _, error = run(capsys, "train", "recipe.yaml", "--set", adapter)
    assert code in (1, 2) and "head" in error


@pytest.mark.slow
@pytest.mark.parametrize("num_bytes, where", [(8_000, "decant-tokenizer-"), (45_000, "run/cache")])
def test_full_disk_is_one_sentence_and_the_same_command_continues(place, capsys, num_bytes, where):
    write_lines(place / "prompts.jsonl", questions(400))
    (place / "recipe.yaml").write_text(RECIPE.replace("rows_per_part: 4", "rows_per_part: 400"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )  # as a full disk: write fails with an error instead of a signal
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        code, _, error = run(capsys, "teach", "recipe.yaml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert code == 1 and where in error and no_cache(place)
    assert run(capsys, "teach", "recipe.yaml")[0] == 0
    assert len(Cache.open(place / "run" / "cache", verify=True)) == 400
