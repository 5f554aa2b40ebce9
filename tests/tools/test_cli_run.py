"""`decant run`: which phases, in which order, in processes of their own, and how failures and signals come back."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.errors import UsageError
from shared.process.parent_watch import started_at
from shared.recipe.recipe import Recipe
from tools import run_all
from tools.own_phase import PhaseFailedError
from tools.run_all import and_next, chosen_phases, nothing_to_do, phase_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("first, last, only, expected", [
    (None, None, None, ("teach", "train", "eval", "report")), ("train", None, None, ("train", "eval", "report")),
    (None, "train", None, ("teach", "train")), ("train", "eval", None, ("train", "eval")), (None, None, "report",
    ("report",)),
])  # fmt: skip
def test_chosen_phases_are_a_stretch_or_one(first, last, only, expected):
    assert chosen_phases(first, last, only) == expected


@pytest.mark.parametrize(
    "first, last, only", [("eval", "train", None), ("teach", None, "eval"), (None, "eval", "eval")]
)
def test_contradicting_choices_are_refused(first, last, only):
    with pytest.raises(UsageError):
        chosen_phases(first, last, only)


def arguments(**changes) -> argparse.Namespace:
    chosen = {
        "recipe": Path("r.yaml"),
        "overrides": ["seed=3"],
        "first": None,
        "last": None,
        "only": None,
        "max_set_aside": None,
        "json": False,
    }
    return argparse.Namespace(**{**chosen, "verbose": False, "allow_unsafe_code": False, **changes})


def smallest(**changes) -> Recipe:
    return Recipe.model_validate({"name": "x", "output_dir": "runs/x", "cache": "c"} | changes)


def test_phases_that_the_recipe_has_nothing_for_are_left_out(monkeypatch):
    ran = []
    monkeypatch.setattr(run_all, "run_phase", lambda phase, command, output: ran.append(phase))
    run_all.run_all(smallest(), arguments())
    assert ran == ["report"]
    assert all(nothing_to_do(smallest(), phase) for phase in ("teach", "train", "eval"))
    stages = [{"name": "kd", "losses": [{"name": "jsd"}]}]
    whole = smallest(teacher={"model": "t"}, student={"model": "s"}, stages=stages, evaluate={"models": ["kd"]})
    run_all.run_all(whole, arguments())
    assert ran == ["report", "teach", "train", "eval", "report"]


def test_phase_gets_recipe_overrides_and_options():
    recipe = smallest()
    assert phase_command("train", recipe, arguments())[3:] == [
        "tools.cli",
        "train",
        "r.yaml",
        "--set",
        "seed=3",
        "--checked",
    ]
    assert phase_command("teach", recipe, arguments(max_set_aside=0.5))[-2:] == ["--max-set-aside", "0.5"]
    assert float(phase_command("teach", recipe, arguments(max_set_aside=1e-13))[-1]) == 1e-13
    assert phase_command("eval", recipe, arguments(allow_unsafe_code=True))[-1] == "--allow-unsafe-code"
    assert phase_command("report", recipe, arguments(json=True, verbose=True))[4:] == [
        "report",
        "runs/x",
        "--json",
        "--verbose",
    ]


def test_a_command_names_the_one_that_comes_after_it():
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "output_dir": "runs/my x",
            "cache": "c",
            "student": {"model": "s"},
            "evaluate": {"models": ["base"]},
        }
    )
    args = arguments(overrides=["seed=3"])
    args.recipe, args.checked = Path("my r.yaml"), False
    said = {done: and_next("done", done, recipe, args).splitlines() for done in ("plan", "teach", "train", "eval")}
    after = {done: shlex.split(line.removeprefix("next: ")) for done, (_, line) in said.items()}
    assert after["plan"] == ["decant", "run", "my r.yaml", "--set", "seed=3"]
    assert after["teach"] == after["train"] == ["decant", "eval", "my r.yaml", "--set", "seed=3"]  # no stage to train
    assert after["eval"] == ["decant", "report", "runs/my x"]
    args.checked = True
    assert and_next("done", "teach", recipe, args) == "done"
    args.checked, args.partition = False, (0, 2)
    assert and_next("done", "teach", recipe, args) == "done"


@pytest.mark.parametrize("code, part", [
    ("raise SystemExit(1)", "exit code 1"), ("import os; os.kill(os.getpid(), 9)",
    "signal 9; the machine may have run out"),
])  # fmt: skip
def test_failed_phase_stops_the_run_and_says_how_it_ended(code, part):
    with pytest.raises(PhaseFailedError, match=part):
        run_all.run_phase("teach", [sys.executable, "-c", code], None)


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_run_ends_with_the_code_of_a_phase_that_was_asked_for_what_is_wrong(code):
    with pytest.raises(PhaseFailedError) as failed:
        run_all.run_phase("teach", [sys.executable, "-c", f"raise SystemExit({code})"], None)
    assert failed.value.exit_code == (2 if code == 2 else 1)


def test_phase_is_stopped_with_the_run_and_may_finish_first(tmp_path):
    note = tmp_path / "note"
    phase = (
        "import signal, time, pathlib, sys\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(note)!r}).write_text('closed'), sys.exit(0)))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    program = f"""
import sys
import time
from tools import cli, run_all
def command(args):
    run_all.run_phase("teach", [sys.executable, "-c", {phase!r}], None)
    return 0
cli.COMMANDS["doctor"] = command
sys.exit(cli.main(["doctor"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (process.returncode, note.read_text()) == (143, "closed")


@pytest.mark.parametrize(
    ("number", "sentence"), [(signal.SIGTERM, "terminated by SIGTERM"), (signal.SIGINT, "interrupted")]
)
def test_a_run_that_is_stopped_with_its_phase_says_so_once(number, sentence):
    phase = (
        "import sys, time\nfrom tools import cli\n"
        "cli.COMMANDS['doctor'] = lambda args: print('ready', flush=True) or time.sleep(60) or 0\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    program = f"""
import signal, sys
from tools import cli, own_phase
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
def command(args):
    own_phase.run_phase("teach", [sys.executable, "-c", {phase!r}], None)
    return 0
cli.COMMANDS["doctor"] = command
sys.exit(cli.main(["doctor"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)  # as Ctrl-C does
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 128 + number
    assert said == ["teach: begins", f"decant: error: {sentence}; the same command continues where it stopped"]


def test_phase_ends_with_a_run_that_is_killed(tmp_path):
    phase = (
        "import os, sys, time\n"
        "from tools import cli\n"
        "cli.COMMANDS['doctor'] = lambda args: print(os.getpid(), flush=True) or time.sleep(60) or 0\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    program = (
        f"import sys; from tools import run_all; run_all.run_phase('teach', [sys.executable, '-c', {phase!r}], None)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    phase_id = int(process.stdout.readline())
    time.sleep(1.0)
    assert started_at(phase_id) is not None
    process.kill()
    process.wait()
    bound = time.monotonic() + 30
    while started_at(phase_id) is not None and time.monotonic() < bound:
        time.sleep(0.05)
    assert started_at(phase_id) is None


RECIPE = """\
name: tiny
output_dir: run
teacher: {model: teacher, engine: transformers, dtype: float32, max_model_len: 128}
prompts: [{source: a, path: prompts.jsonl, format: messages}]
generate: {max_new_tokens: 12}
capture: {k: 8}
cache: run/cache
rows_per_part: 8
heldout: {fraction: 0.2}
student: {model: student}
stages: [{name: kd, losses: [{name: forward_kl}], trainer: {max_steps: 4, pack_tokens: 256}}]
evaluate:
  models: [kd]
  engine: transformers
  max_new_tokens: 8
  tasks: [{name: gsm8k, path: sums.test.jsonl}]
"""


@pytest.mark.slow
def test_run_does_everything_once_and_nothing_twice(tmp_path):
    from tests.tiny_models import make_qwen3

    make_qwen3(tmp_path / "teacher", seed=0)
    make_qwen3(tmp_path / "student", seed=1, num_layers=1)
    prompts = [
        {"messages": [{"role": "user", "content": f"Anna has {i} apples and gives {i // 2} away. How many?"}]}
        for i in range(24)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    questions = [{"question": f"How many is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(4)]
    (tmp_path / "sums.test.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def decant(*words) -> str:
        command = [sys.executable, "-P", "-m", "tools.cli", *words]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    report = json.loads(decant("run", "recipe.yaml", "--json"))
    assert set(report["models"]) == {"kd"}
    seconds = json.loads((tmp_path / "run" / "seconds.json").read_text())
    assert set(seconds) == {"teach", "train.kd", "evaluate", "report"}
    assert all(value > 0 for value in seconds.values())
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "cache").rglob("part-*")}
    table = decant("run", "recipe.yaml")
    assert "held-out KL" in table
    assert json.loads((tmp_path / "run" / "seconds.json").read_text()) == seconds
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "cache").rglob("part-*")} == parts
    plan = json.loads(decant("plan", "recipe.yaml", "--json"))
    assert (plan["rows_to_do"], plan["cache"]["rows"], plan["hours"]) == (0, 24, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("long_rows", [(3,), (0, 5, 9)])
def test_a_run_that_set_long_rows_aside_continues_with_the_same_command(tmp_path, monkeypatch, capfd, long_rows):
    from shared.cache.cache import Cache
    from tests.tiny_models import make_qwen3
    from tools import cli

    make_qwen3(tmp_path / "teacher", seed=0, num_layers=1)
    make_qwen3(tmp_path / "student", seed=1, num_layers=1)
    asked = [f"Anna has {i} apples{' and one more' * (60 if i in long_rows else 0)}. How many?" for i in range(12)]
    prompts = [{"messages": [{"role": "user", "content": text}]} for text in asked]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    settings = RECIPE.split("evaluate:")[0].replace("max_new_tokens: 12", "max_new_tokens: 6")
    (tmp_path / "recipe.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)

    def phase(name, command, output) -> None:
        code = cli.main(command[command.index("tools.cli") + 1 :])
        if code:
            raise PhaseFailedError(f"phase {name} ended with exit code {code}")

    monkeypatch.setattr(run_all, "run_phase", phase)
    command = ["run", "recipe.yaml", "--to", "train"]
    assert cli.main(command) == 1
    assert f"{len(long_rows)} of 12 rows cannot be used, more than the 1% that are set aside" in capfd.readouterr().err
    assert not (tmp_path / "run" / "train").exists()
    accepting = [*command, "--max-set-aside", "0.5"]
    assert cli.main(accepting) == 0, capfd.readouterr().err
    assert len(Cache.open(tmp_path / "run" / "cache")) == 12 - len(long_rows)
    weights = tmp_path / "run" / "train" / "kd" / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    seconds = (tmp_path / "run" / "seconds.json").read_text()
    assert cli.main(accepting) == 0, capfd.readouterr().err
    assert (weights.stat().st_mtime_ns, (tmp_path / "run" / "seconds.json").read_text()) == (written, seconds)
    capfd.readouterr()
    assert cli.main(["plan", "recipe.yaml", "--json"]) == 0
    planned = json.loads(capfd.readouterr().out)
    assert (planned["rows_to_do"], planned["set_aside"]) == (0, len(long_rows))
