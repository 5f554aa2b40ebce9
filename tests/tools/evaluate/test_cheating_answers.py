"""Programs that solve nothing score 0, right ones with odd names 1, and no program costs another its verdict."""

from __future__ import annotations

import gzip
import json
import os
import pwd
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tools.evaluate.odd_programs import CHEATS, RIGHT
from tools.evaluate.sandbox import function_calls, sandbox
from tools.evaluate.tasks import humaneval
from tools.evaluate.tasks.questions import Question

ROOT = Path(__file__).parents[3]
ROW = {
    "prompt": 'import math\n\n\ndef twice(x):\n    return x + x\n\n\ndef add(a, b):\n    """Add."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate([1], [2]) == [1, 2]\n"
    "    assert add(2, 2) == twice(2)\n    assert abs(candidate(0.5, 0.25) - 0.75) < 1e-6\n",
}


def question(row: dict[str, str] = ROW) -> Question:
    return Question("x:1", row["prompt"], "", row)


@pytest.fixture(autouse=True)
def _needs_a_sandbox() -> None:
    if sandbox.available() is None:
        pytest.skip("no sandbox works on this machine")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "endless" in name else name for name in CHEATS]
)
def test_a_program_that_solves_nothing_scores_0(name: str) -> None:
    (score,) = humaneval.score_answers([(question(), f"```python\n{CHEATS[name]}\n```")])
    assert score.value == 0
    assert score.reason


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_scores_1_whatever_its_names(name: str) -> None:
    (score,) = humaneval.score_answers([(question(), f"```python\n{RIGHT[name]}\n```")])
    assert (score.value, score.reason) == (1, "")


def test_reasons_say_what_the_answer_died_of() -> None:
    answers = {
        "def add(a, b): return a // 0": "ZeroDivisionError",
        "def add(a, b) return a": "SyntaxError",
        "def add(a, b): return map(str, [a])": "TypeError: map is no plain data",
        "import nothing_of_this_name\ndef add(a, b): return a": "ModuleNotFoundError",
        "def add(a, b): return a": "AssertionError",
    }
    scores = humaneval.score_answers([(question(), f"```python\n{answer}\n```") for answer in answers])
    for score, reason in zip(scores, answers.values(), strict=True):
        assert reason in score.reason
    tests, endless = humaneval.programs(question(), "    while True: pass\n")
    assert sandbox.run(tests, sandbox.Limits(seconds=0.5), beside=endless).reason.startswith("ran out of")


def test_tests_may_expect_an_exception() -> None:
    test = "def check(f):\n    try:\n        f(1, 2)\n    except {}:\n        return\n    assert False\n"
    row = {**ROW, "test": test.format("ValueError")}
    raising = "```python\nclass Own(ValueError): pass\ndef add(a, b): raise Own('no')\n```"
    dying = "```python\nimport os\ndef add(a, b): os._exit(1)\n```"
    scores = humaneval.score_answers(
        [
            (question(row), raising),
            (question({**ROW, "test": test.format("Exception")}), dying),
            (question(row), "    return 0\n"),
        ]
    )
    assert [score.value for score in scores] == [1, 0, 0]


def test_an_answer_cannot_end_the_iteration_of_the_tests() -> None:
    test = "def check(f):\n    assert all(map(lambda case: f(case, case) == 2 * case, [1, 2, 3]))\n"
    row = {**ROW, "test": test}
    bodies = ("    raise StopIteration\n", "    return a + b if a < 2 else next(iter([]))\n", "    return a + b\n")
    scores = humaneval.score_answers([(question(row), body) for body in bodies])
    assert [score.value for score in scores] == [0, 0, 1]


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -(2**63), 2**70, 1.5, float("inf"), "é\ud800\x00", b"\x00\xff", bytearray(b"a"), 1 + 2j, [],
        (), {}, set(), frozenset(), [1, (2, [3, {4: (5,), "6": {7, 8}}])], {(1, "a"): frozenset({2})},
        {"tuple": [1]}, {"int": "0x5"},
    ],
)  # fmt: skip
def test_data_crosses_with_its_types(value: object) -> None:
    crossed = function_calls.decode(json.loads(json.dumps(function_calls.encode(value))))
    assert crossed == value
    assert function_calls.decode(function_calls.encode([-(10**5000)])) == [-(10**5000)]
    assert repr(crossed)[:100] == repr(value)[:100] if not isinstance(value, int) else type(crossed) is type(value)


HOSTILE = {
    "a nested verdict": "import os, sys\nos.write(int(sys.argv[1]), b'[' * 15000); os._exit(0)",
    "deep directories": "import os, time\nfor i in range(20): os.mkdir('d' * 250); os.chdir('d' * 250)\ntime.sleep(.3)",
    "deeper directories": "import os\nfor i in range(3000): os.mkdir('d' * 250); os.chdir('d' * 250)\n",
    "a closed directory": "import os, time\nos.mkdir('d', 0)\ntime.sleep(.3)",
    "closed ones inside": "import os, time\nos.mkdir('d'); os.mkdir('d/e', 0); os.mkdir('d/f', 365)\ntime.sleep(.3)",
    "bytes for a verdict": "import os, sys\nos.write(int(sys.argv[1]), bytes(range(256)) * 60); os._exit(0)",
}
PROBE = """
import json, sys
from tools.evaluate.sandbox import sandbox
hostile = json.load(sys.stdin)
groups = [sandbox.run_many(["pass", code, "pass"], mechanism=sys.argv[1]) for code in hostile]
print(json.dumps([[verdict.passed for verdict in group] for group in groups]))
"""


@pytest.mark.parametrize("as_root", [True, False])
@pytest.mark.parametrize("mechanism", ["bubblewrap", "landlock+seccomp"])
def test_one_program_does_not_end_the_verdicts_of_others(mechanism: str, as_root: bool, tmp_path: Path) -> None:
    if not sandbox._holds(mechanism):
        pytest.skip(f"{mechanism} does not work on this machine")
    options, python = {}, sys.executable
    if as_root == (os.getuid() != 0):
        if as_root:
            pytest.skip("these tests run without root")
        nobody = pwd.getpwnam("nobody")
        # An interpreter in root's home is out of that user's reach.
        python = "/usr/bin/python3" if Path(sys.executable).resolve().is_relative_to("/root") else python
        options = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        tmp_path.chmod(0o777)
        for parent in tmp_path.parents:
            if parent.stat().st_uid == os.getuid() and len(parent.parts) > 2:
                parent.chmod(parent.stat().st_mode | 0o055)
    done = subprocess.run(
        [python, "-B", "-c", PROBE, mechanism],
        input=json.dumps(list(HOSTILE.values())), text=True, capture_output=True, cwd=ROOT, check=False,
        env={"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}, **options,
    )  # fmt: skip
    if options and ("could not" in done.stderr or "No module named" in done.stderr):
        pytest.skip("walls cannot be put up by that user here")
    assert done.returncode == 0, done.stderr
    verdicts = json.loads(done.stdout)
    assert all(first and last for first, _, last in verdicts)
    assert not verdicts[0][1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mechanism", ["bubblewrap", "landlock+seccomp"])
def test_no_file_can_be_made_invisible(mechanism: str) -> None:
    if not sandbox._holds(mechanism):
        pytest.skip(f"{mechanism} does not work on this machine")
    hide = [
        "open('a', 'w').write('x'); os.unlink('a')",
        "open('a', 'w').write('x'); open('b', 'w'); os.rename('b', 'a')",
        "open('a', 'w').write('x'); open('b', 'w'); os.replace('b', 'a')",
        "os.open('.', os.O_TMPFILE | os.O_RDWR)",
        "os.mkdir('d'); os.rmdir('d')",
        "os.memfd_create('a')",
    ]
    for verdict in sandbox.run_many([f"import os\n{code}" for code in hide], mechanism=mechanism):
        assert "PermissionError" in verdict.reason
    held = "import os\nfiles = []\nfor i in range(50):\n    f = open(str(i), 'wb')\n    f.write(bytes(8 << 20))\n"
    held += "    files.append(f)\n    try: os.unlink(str(i))\n    except OSError: pass\nimport time\ntime.sleep(1)"
    assert "wrote more than" in sandbox.run(held, mechanism=mechanism).reason


def test_nothing_of_a_killed_program_is_left_when_its_verdict_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not sandbox._holds("bubblewrap"):
        pytest.skip("bubblewrap does not work on this machine")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "import time\nwhile True:\n    for i in range(99): open(str(i), 'ab').write(bytes(100))\n"
    for _ in range(5):
        started = time.monotonic()
        assert not sandbox.run(code, sandbox.Limits(seconds=0.3), "bubblewrap").passed
        assert time.monotonic() - started < 60
        assert list(tmp_path.iterdir()) == []
        inside = [
            entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and _cwd(entry).startswith(str(tmp_path))
        ]
        assert inside == []


def _cwd(process: Path) -> str:
    try:
        return str((process / "cwd").readlink())
    except OSError:
        return ""


@pytest.mark.slow
def test_every_published_problem_is_lost_by_every_cheat() -> None:
    published = ROOT.parent / "shared" / "data" / "humaneval" / "HumanEval.jsonl.gz"
    if not published.exists():
        pytest.skip("the published HumanEval data is not beside the checkout")
    with gzip.open(published, "rt") as stream:
        rows = [json.loads(line) for line in stream][::16]
    pairs = []
    for row in rows:
        for name, cheat in CHEATS.items():
            if name not in ("arguments emptied", "an endless loop"):
                code = cheat.replace("def add(a, b)", f"def {row['entry_point']}(*a)").replace(
                    "return a\n", "return 0\n"
                )
                pairs.append((question(row), f"```python\n{code}\n```"))
    assert [score for score in humaneval.score_answers(pairs) if score.value] == []
