"""What leaves with a trained model: template and end tokens that it was trained with, whatever its base says."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from shared.cache.cache import Cache
from shared.cache.chat_settings import chat_settings_of
from shared.cache.rendering import rendered_sources
from shared.cache.trained_ends import trained_ends
from shared.models.end_tokens import declared_end_ids, special_ids
from shared.recipe.file import dump_recipe
from shared.recipe.recipe import Recipe
from student_train.evaluate.quality_samples import Sample, student_answers
from student_train.stage.stages import run_stages
from teacher_cache.build import teach
from tests.teacher_cache.engines.test_answer_ends import with_base_eos
from tests.teacher_cache.real_server import RealServer
from tests.tiny_models import CHATML, TURN_END, make_qwen3
from tools.cli import main

OTHER = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role.upper() + ':\n' + m.content + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>ASSISTANT:\n' }}{%- endif %}"
)


def talks(path: Path, count: int = 10, answer: str = "They are {}.") -> str:
    rows = [
        [
            {"role": "user", "content": f"How many are {i} apples at {path.stem}?"},
            {"role": "assistant", "content": answer.format(i)},
        ]
        for i in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    return str(path)


def recipe(directory: Path, teacher: Path, prompts: list[dict], student: Path | None = None, **more) -> Recipe:
    trainer = {"max_steps": 1, "pack_tokens": 192, "learning_rate": 3e-3, "report_to": "none"}
    return Recipe.model_validate(
        {
            "name": "t",
            "output_dir": str(directory / "run"),
            "teacher": {"model": str(teacher), "engine": "transformers", "dtype": "float32", "max_model_len": 128},
            "prompts": [{"format": "messages", **prompt} for prompt in prompts],
            "capture": {"k": 4},
            "cache": str(directory / "cache"),
            "heldout": {"fraction": 0},
            "student": {"model": str(student or teacher)},
            "stages": [{"name": "kd", "losses": [{"name": "cross_entropy"}], "trainer": trainer}],
            **more,
        }
    )


def exported_tokenizer(work: Recipe):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(work.stage_dir("kd") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("own", [None, OTHER])
def test_the_recipes_template_leaves_with_the_model_where_all_sources_share_it(tmp_path, own):
    """One source gives it as a file, the other as text, and a third is plain text that no template renders."""
    teacher = make_qwen3(tmp_path / "teacher", num_layers=1, chat_template=own)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    texts = tmp_path / "c.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Number {i} is {i} apples."}) + "\n" for i in range(6)))
    work = recipe(
        tmp_path,
        teacher,
        [
            {"source": "a", "path": talks(tmp_path / "a.jsonl"), "chat_template": str(tmp_path / "chatml.jinja")},
            {"source": "b", "path": talks(tmp_path / "b.jsonl"), "chat_template": CHATML},
            {"source": "c", "path": str(texts), "format": "text"},
        ],
    )
    teach(work)
    run_stages(work)
    tokenizer = exported_tokenizer(work)
    assert tokenizer.chat_template == CHATML
    asked = [{"role": "user", "content": "How many are 3 apples at a?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    cache = Cache.open(work.cache[0])
    prompts = [cache.sequence(i).token_ids[: cache.sequence(i).spans[0, 0]].tolist() for i in range(len(cache))]
    assert ids in prompts


@pytest.mark.slow
def test_templates_that_differ_leave_the_tokenizers_own_and_are_named(tmp_path):
    teacher = make_qwen3(tmp_path / "teacher", num_layers=1)
    work = recipe(
        tmp_path,
        teacher,
        [
            {"source": "plain", "path": talks(tmp_path / "a.jsonl")},
            {"source": "loud", "path": talks(tmp_path / "b.jsonl"), "chat_template": OTHER},
        ],
    )
    teach(work)
    run_stages(work)
    assert exported_tokenizer(work).chat_template == CHATML
    note = chat_settings_of(work, [Cache.open(work.cache[0])], exported_tokenizer(work)).note
    assert note == "the sources were rendered with 2 chat templates (plain; loud), so the tokenizer's own stays"


def test_settings_are_found_in_the_cache_where_the_recipe_has_no_prompts(tmp_path):
    teacher = make_qwen3(tmp_path / "teacher", num_layers=1, chat_template=None)
    source = {"source": "a", "path": talks(tmp_path / "a.jsonl"), "chat_template": OTHER, "system": "Be brief."}
    work = recipe(tmp_path, teacher, [source])
    teach(work)
    bare = work.model_copy(update={"prompts": (), "teacher": None})
    (found,) = rendered_sources(bare)
    assert (found.source, found.system, found.chat_template) == ("a", "Be brief.", OTHER)
    taken = {"path": str(work.cache[0]), "format": "cache"}
    second = recipe(tmp_path / "second", teacher, [taken])
    teach(second)
    assert rendered_sources(second) == (found,)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_student_stops_by_itself_at_the_end_token_of_the_template(tmp_path, adapter):
    """The base's eos is another; its stock `generate`, told nothing, ends at the token that it was trained to write."""
    from transformers import AutoModelForCausalLM

    teacher = with_base_eos(make_qwen3(tmp_path / "teacher", seed=1, num_layers=1, end_scale=3.0))
    generation = json.loads((teacher / "generation_config.json").read_text())
    del generation["do_sample"]
    (teacher / "generation_config.json").write_text(json.dumps({**generation, "temperature": 0.7, "top_p": 0.9}))
    path = talks(tmp_path / "a.jsonl", 12, "Hello.")
    work = recipe(tmp_path, teacher, [{"source": "a", "path": path}], student=teacher)
    document = work.model_dump(mode="json")
    document["student"]["adapter"] = {"kind": adapter}
    document["stages"][0]["trainer"] |= {"max_steps": 60, "learning_rate": 1e-2}
    work = Recipe.model_validate(document)
    teach(work)
    (model_dir,) = run_stages(work)
    tokenizer = exported_tokenizer(work)
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    assert declared_end_ids(model_dir) == (end, tokenizer.eos_token_id)
    assert trained_ends(Cache.open(work.cache[0]), special_ids(tokenizer)) == (end,)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How many are 3 apples at a?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    answer = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
    assert answer[-1] == end
    assert len(answer) < 40
    assert tokenizer.decode(answer[:-1]) == "Hello."
    samples = [Sample("a", "", "", ids[0].numpy())]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    told = [student_answers(model, model, samples, tokenizer, ends, "sdpa", 40)[0] for ends in ((end,), ())]
    assert told[0] == "Hello."
    assert len(told[1]) > len(told[0])


@pytest.mark.slow
def test_export_mends_what_an_older_version_trained_and_its_card_shows_how_to_ask(tmp_path, capsys):
    """The stage's model as it was left before: the tokenizer's eos alone, no template."""
    from transformers import AutoTokenizer

    teacher = with_base_eos(make_qwen3(tmp_path / "teacher", num_layers=1, chat_template=None))
    (teacher / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: someone/first\n---\n# Tiny\n")
    source = {"source": "a", "path": talks(tmp_path / "a.jsonl"), "chat_template": CHATML, "system": "Be brief."}
    work = recipe(tmp_path, teacher, [source])
    teach(work)
    (model_dir,) = run_stages(work)
    (work.output_dir / "recipe.yaml").write_text(dump_recipe(work))
    tokenizer = exported_tokenizer(work)
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    assert main(["export", str(work.output_dir)]) == 0
    assert "settings" not in json.loads((work.output_dir / "export/kd/decant-export.json").read_text())
    (model_dir / "chat_template.jinja").unlink()
    generation = json.loads((model_dir / "generation_config.json").read_text()) | {"eos_token_id": 0}
    (model_dir / "generation_config.json").write_text(json.dumps(generation))
    out = tmp_path / "mended"
    assert main(["export", str(work.output_dir), "--output", str(out)]) == 0
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML
    assert declared_end_ids(out) == (end, 0)
    capsys.readouterr()
    assert main(["export", str(work.output_dir), "--output", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reused"]
    card = (out / "README.md").read_text()
    for part in ('license: "apache-2.0"', "`someone/first`", "licence apache-2.0", f"trained to write: {end} "):
        assert part in card, part
    program = card.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", program], cwd=out, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Be brief." in program


@pytest.mark.slow
def test_printed_command_serves_the_export_and_it_stops_by_itself(tmp_path, capsys):
    """A chat over HTTP with no stop settings at all, under the build that is installed."""
    pytest.importorskip("vllm")
    teacher = with_base_eos(make_qwen3(tmp_path / "teacher", seed=1, num_layers=1, chat_template=None))
    source = {"source": "a", "path": talks(tmp_path / "a.jsonl", 12, "Hello."), "chat_template": CHATML}
    work = recipe(tmp_path, teacher, [source])
    document = work.model_dump(mode="json")
    document["stages"][0]["trainer"] |= {"max_steps": 60, "learning_rate": 1e-2}
    work = Recipe.model_validate(document)
    teach(work)
    run_stages(work)
    (work.output_dir / "recipe.yaml").write_text(dump_recipe(work))
    capsys.readouterr()
    assert main(["export", str(work.output_dir), "--json"]) == 0
    command = shlex.split(json.loads(capsys.readouterr().out)["serve"])
    server = RealServer(tmp_path, tmp_path / "server.log")
    python = Path(sys.executable)
    server._command = [str(python.with_name(command[0])), *command[1:], "--port", str(server.port)]
    server._command += ["--enforce-eager", "--max-model-len", "256"]
    server.start()
    try:
        server.wait_until_up()
        body = {
            "model": str(work.output_dir / "export/kd"),
            "messages": [{"role": "user", "content": "How many are 3 apples at a?"}],
            "max_tokens": 40,
            "temperature": 0,
        }
        request = urllib.request.Request(
            f"{server.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            (choice,) = json.loads(answer.read())["choices"]
    finally:
        server.kill()
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello.", "stop")
