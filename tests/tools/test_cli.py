"""The command line: what it loads, its exit codes, and that every way to fail is one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import CacheError
from tools import cli
from tools.cli_parser import build_parser

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "vllm", "transformers", "datasets", "matplotlib", "accelerate", "peft")

RECIPE = """\
name: x
output_dir: {out}
cache: {out}/cache
student: {{model: s}}
stages:
  - {{name: kd, losses: [{{name: forward_kl}}]}}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(out=tmp_path / "run"))
    return path


@pytest.fixture(autouse=True)
def signals_and_environment():
    """Commands set both for their own process; put them back."""
    handler, environment = signal.getsignal(signal.SIGTERM), dict(os.environ)
    yield
    signal.signal(signal.SIGTERM, handler)
    os.environ.clear()
    os.environ.update(environment)


def run_python(code: str, *, send: int | None = None, **options) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own; `send` a signal once it has printed a line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    if send is not None:
        process.stdout.readline()
        process.send_signal(send)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_help_of_every_command_loads_nothing_heavy():
    code = f"""
import sys, contextlib, io
from tools.cli import main, COMMANDS
of_caches = [["cache", name] for name in ("ls", "show", "stats", "verify", "gc")]
for words in [[], *[[name] for name in COMMANDS], *of_caches]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main([*words, "--help"])
        except SystemExit as stop:
            assert stop.code == 0, words
    assert out.getvalue().startswith("usage: decant"), words
print([name for name in {HEAVY!r} + ("numpy", "pyarrow", "pydantic") if name in sys.modules])
"""
    done = run_python(code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_every_listed_command_exists():
    actions = [action for action in build_parser()._actions if action.dest == "command"]
    assert set(actions[0].choices) == set(cli.COMMANDS)


@pytest.mark.parametrize("words", [
    [], ["tech"], ["--nonsense"], ["teach"], ["teach", "a.yaml", "b.yaml"], ["teach", "a.yaml", "--partition", "4/4"],
    ["teach", "a.yaml", "--partition", "x"], ["teach", "a.yaml", "--max-set-aside", "2"], ["run", "a.yaml", "--only",
    "sleep"],
    ["cache"], ["cache", "look"], ["cache", "ls"], ["cache", "show", "c", "--row", "-1"], ["report"], ["train",
    "a.yaml", "--set"],
    ["plan", "no-such-recipe.yaml"], ["init", "../up"],
])  # fmt: skip
def test_wrong_usage_leaves_with_two_and_no_traceback(words, capsys):
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert (code, "Traceback" in captured.err) == (2, False)
    assert "decant" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("words", [
    ["teach", "a.yaml", "--partition", "\u0661/5"], ["teach", "a.yaml", "--partition", "0/" + "9" * 5000],
    ["cache", "show", "c", "--row", "\u0661"], ["cache", "subset", "c", "o", "--share", "\u0661"],
])  # fmt: skip
def test_only_plain_digits_are_numbers(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "; expected " in capsys.readouterr().err


ADDRESS = "https://me:hunter2@host/demo"


@pytest.mark.parametrize("words", [
    ["plan", ADDRESS], ["report", ADDRESS], ["export", "run", "--output", ADDRESS], ["cache", "gc", ADDRESS],
    ["cache", "ls", ADDRESS], ["cache", "ls", "cache", ADDRESS], ["export", "run", "--push", ADDRESS],
    ["plan", "r.yaml", "--card", ADDRESS], ["plan", "no-such.yaml", "--set", ADDRESS],
])  # fmt: skip
def test_no_message_repeats_the_password_of_an_address(words, recipe, capsys):
    words = [str(recipe) if word == "r.yaml" else word for word in words]
    try:
        assert cli.main(words) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert "hunter2" not in capsys.readouterr().err


@pytest.mark.parametrize("override, code, part", [
    ("sede=1", 2, "did you mean 'seed'?"), ("stages.kd.trainer.max_steps=x", 2, "expected a number"), ("a", 2,
    "path=value"),
])  # fmt: skip
def test_recipe_error_is_printed_once_with_its_place(recipe, capsys, override, code, part):
    assert cli.main(["plan", str(recipe), "--set", override]) == code
    err = capsys.readouterr().err
    assert err.startswith("decant: error: --set ")
    assert part in err
    assert err.count("\n") == 1


def test_traceback_of_an_expected_error_is_shown_on_request_only(recipe, capsys, monkeypatch):
    monkeypatch.setenv("DECANT_DEBUG", "1")
    assert cli.main(["plan", str(recipe), "--set", "sede=1"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_stage_that_is_not_in_the_recipe_is_refused_before_anything_is_loaded(recipe, capsys):
    assert cli.main(["train", str(recipe), "--from-stage", "kdd"]) == 2
    assert "did you mean 'kd'?" in capsys.readouterr().err


def test_report_of_a_run_that_is_not_there_fails(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("decant: error: ")


def test_bug_is_named_in_one_line_and_its_traceback_kept_in_the_run(recipe, tmp_path, capsys, monkeypatch):
    def broken(args):
        cli._load(args, save=True)
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setitem(cli.COMMANDS, "plan", broken)
    assert cli.main(["plan", str(recipe)]) == 1
    err = capsys.readouterr().err
    [kept] = (tmp_path / "run").glob("decant-crash-*.txt")
    assert err.startswith("decant: error: this is a bug in Decant: ZeroDivisionError: first line; the traceback is in ")
    assert err.count("\n") == 1
    assert str(kept) in err
    assert "Traceback" in kept.read_text()
    assert cli.main(["plan", str(recipe), "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error, code, line", [
    (CacheError("a cache is gone"), 1, "decant: error: a cache is gone"),
    (PermissionError(13, "Permission denied", "/somewhere"), 1,
     "decant: error: /somewhere: Permission denied; correct its permissions or name another path"),
    (OSError(28, "No space left"), 1, "decant: error: No space left; free some space or lift the limit"),
    (KeyboardInterrupt(), 130, "decant: error: interrupted; the same command continues where it stopped"),
])  # fmt: skip
def test_failure_is_one_line_with_its_exit_code(recipe, capsys, monkeypatch, error, code, line):
    def fail(args):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "plan", fail)
    assert cli.main(["plan", str(recipe)]) == code
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_unwinds_and_leaves_one_line(number, code, recipe):
    program = f"""
import signal, sys, time
from tools import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
def slow(args):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("closed", flush=True)
cli.COMMANDS["plan"] = slow
sys.exit(cli.main(["plan", {str(recipe)!r}]))
"""
    done = run_python(program, send=number)
    assert (done.returncode, done.stdout) == (code, "closed\n")
    assert done.stderr.count("\n") == 1
    assert "the same command continues" in done.stderr


@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1 2"])
def test_streams_that_were_closed_lead_nowhere_and_no_file_becomes_one(closed, tmp_path):
    program = f"""
import os, sys
for number in {closed!r}.split():
    os.close(int(number))
os.execv(sys.executable, [sys.executable, "-c", '''
import os, sys
from tools import cli
def work(args):
    with open("kept", "w") as kept:
        print("a line that a stranger reads")
        print("another", file=sys.stderr)
        kept.write(str(kept.fileno() > 2 and sys.stdin.read()))
    return 0
cli.COMMANDS["plan"] = work
sys.exit(cli.main(["plan", "recipe.yaml"]))
'''])
"""
    assert run_python(program, cwd=tmp_path).returncode == 0
    assert (tmp_path / "kept").read_text() == ""


def test_reader_that_goes_away_is_no_error_message(recipe):
    program = f"""
import sys
from tools import cli
def loud(args):
    for i in range(100000):
        print("line", i)
    return 0
cli.COMMANDS["plan"] = loud
sys.exit(cli.main(["plan", {str(recipe)!r}]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), err) == (1, b"")


@pytest.mark.slow
def test_json_is_alone_on_standard_output_whatever_libraries_print(recipe):
    program = f"""
import os, sys
from tools import cli, phases
from tools.plan.preflight import checks as preflight
preflight.CHECKS = ()
def train(recipe, first, last, again):
    print("a library talks")
    os.write(1, b"and another\\n")
    return {{"models": {{"kd": "m"}}}}, "text"
phases.train = train
sys.exit(cli.main(["train", {str(recipe)!r}, "--json"]))
"""
    done = run_python(program)
    assert json.loads(done.stdout) == {"models": {"kd": "m"}}
    assert "a library talks" in done.stderr
    assert "and another" in done.stderr


def test_resolved_recipe_is_saved_with_the_run(recipe, tmp_path, monkeypatch):
    from shared.recipe.file import load_recipe
    from tools import phases
    from tools.plan.preflight import checks as preflight

    monkeypatch.setattr(phases, "train", lambda recipe, first, last, *_: ({}, ""))
    monkeypatch.setattr(preflight, "CHECKS", ())
    assert cli.main(["train", str(recipe), "--set", "stages.kd.trainer.max_steps=7"]) == 0
    assert load_recipe(tmp_path / "run" / "recipe.yaml").stage("kd").trainer.max_steps == 7


def test_version_is_that_of_the_distribution(capsys):
    from importlib.metadata import version

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"decant {version('decant-kd')}\n"


def test_child_processes_keep_the_plain_meaning_of_sigterm(recipe):
    program = f"""
import os, signal, sys, time
from tools import cli
def forks(args):
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return 0
cli.COMMANDS["plan"] = forks
sys.exit(cli.main(["plan", {str(recipe)!r}]))
"""
    done = run_python(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{-signal.SIGTERM}\n", "")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_that_a_finaliser_swallows_is_not_lost(number, code, recipe):
    program = f"""
import signal, sys, time
from tools import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
class Slow:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(60)
def work(args):
    Slow()
    time.sleep(60)
cli.COMMANDS["plan"] = work
sys.exit(cli.main(["plan", {str(recipe)!r}]))
"""
    done = run_python(program, send=number)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1 and "the same command continues" in done.stderr


def test_escape_sequences_of_an_error_are_shown(capsys) -> None:
    assert cli.main(["cache", "ls", "no\x1b[31mcache"]) == 2
    assert "no\\x1b[31mcache is not a cache" in capsys.readouterr().err


def test_line_breaks_of_paths_and_options_forge_no_second_line(capsys) -> None:
    assert cli.main(["cache", "ls", "no\ndecant: error: cache"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["cache", "subset", "a", "b", "--share", "\x1b[31m2\ndecant: done"])
    first, second = capsys.readouterr().err.splitlines()
    assert "no\\ndecant: error: cache is not a cache" in first
    assert "'\\x1b[31m2\\ndecant: done' is no share" in second


def test_too_little_memory_is_no_bug(recipe, capsys, monkeypatch):
    def fail(args):
        raise MemoryError("Unable to allocate 8.00 GiB")

    monkeypatch.setitem(cli.COMMANDS, "plan", fail)
    assert cli.main(["plan", str(recipe)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("decant: error: memory ran out (Unable to allocate 8.00 GiB), ") and "bug" not in err


def test_a_named_pipe_is_no_recipe_and_one_that_is_open_is(recipe, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert cli.main(["plan", str(tmp_path / "pipe.yaml")]) == 2
    assert "pipe.yaml: is a pipe" in capsys.readouterr().err
    reader, writer = os.pipe()
    os.write(writer, b"name: [")
    os.close(writer)
    assert cli.main(["plan", f"/dev/fd/{reader}"]) == 2
    assert f"/dev/fd/{reader}:1: no valid YAML" in capsys.readouterr().err
    os.close(reader)


def test_traceback_of_a_bug_follows_no_link_that_somebody_laid_in_its_place(tmp_path, monkeypatch, capsys):
    def fail(args):
        raise ZeroDivisionError("first line")

    monkeypatch.setitem(cli.COMMANDS, "doctor", fail)
    monkeypatch.setattr(cli.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cli.time, "strftime", lambda form: "now")
    place = tmp_path / f"decant-crash-now-{os.getpid()}.txt"
    (tmp_path / "mine").write_text("mine")
    place.symlink_to(tmp_path / "mine")
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err.endswith("ZeroDivisionError: first line; the traceback is shown with --verbose\n")
    assert (tmp_path / "mine").read_text() == "mine"
    place.unlink()
    assert cli.main(["doctor"]) == 1
    assert "ZeroDivisionError: first line" in place.read_text() and place.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "words",
    [
        ["report", "run", "--output", "URL"],
        ["report", "URL"],
        ["export", "run", "--output", "URL"],
        ["init", "name", "--output", "URL"],
        ["plan", "URL"],
        ["cache", "import", "URL", "out", "--tokenizer", "t"],
    ],
)
def test_what_is_written_or_read_here_is_no_url(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.main(["s3://bucket/demo" if word == "URL" else word for word in words])
    assert left.value.code == 2
    assert "'s3://bucket/demo' is a URL where a" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
