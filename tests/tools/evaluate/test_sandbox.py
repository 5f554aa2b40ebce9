"""Attempts to get out of the sandbox, each with each mechanism that this machine has; and what must
still work inside."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from shared.errors import EvaluationError
from tools.evaluate.sandbox import sandbox
from tools.evaluate.sandbox.fork_server import ForkServer

MECHANISMS = ("bubblewrap", "landlock+seccomp")


@pytest.fixture(params=MECHANISMS)
def mechanism(request: pytest.FixtureRequest) -> str:
    if not sandbox._holds(request.param):
        pytest.skip(f"{request.param} does not work on this machine")
    return request.param


def attempt(code: str, mechanism: str, **limits: float) -> sandbox.Verdict:
    return sandbox.run(textwrap.dedent(code), sandbox.Limits(**{"seconds": 2.0, **limits}), mechanism)


def test_correct_program_passes_and_failing_ones_do_not(mechanism: str) -> None:
    assert attempt("import math, heapq, itertools, hashlib\nassert math.gcd(12, 18) == 6", mechanism).passed
    failed = attempt("assert 1 == 2, 'no'", mechanism)
    assert (failed.passed, failed.reason) == (False, "AssertionError: no")
    assert "SyntaxError" in attempt("def f(:", mechanism).reason


@pytest.mark.parametrize(
    "leave",
    [
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os._exit(0)",
        "quit = None; exit = 0; raise KeyboardInterrupt",
    ],
)
def test_leaving_early_is_not_passing(mechanism: str, leave: str) -> None:
    assert not attempt(leave + "\nassert False", mechanism).passed


def test_files_outside_can_be_neither_read_nor_written_also_by_root(mechanism: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    tmp_path.chmod(0o777)
    tries = [
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"os.unlink({str(secret)!r})",
    ]
    tries += [
        f"os.chmod({str(secret)!r}, 0o777)",
        f"os.rename({str(secret)!r}, 'here')",
        f"os.symlink({str(secret)!r}, 'link')",
        f"os.listdir({str(tmp_path)!r})",
    ]
    tries += [
        f"os.link({str(secret)!r}, 'link')",
        f"os.truncate({str(secret)!r}, 0)",
        "open('/etc/shadow').read()",
        "open('/etc/passwd', 'a')",
    ]
    for one in tries:
        verdict = attempt(f"import os\n{one}", mechanism)
        assert not verdict.passed, one
        assert "Error" in verdict.reason
    assert secret.read_text() == "secret"
    assert [path.name for path in tmp_path.iterdir()] == ["secret.txt"]


def test_the_own_directory_can_be_written_and_is_gone_afterwards(mechanism: str) -> None:
    before = set(Path(os.environ.get("TMPDIR", "/tmp")).glob("decant-sandbox-*"))
    assert attempt(
        "import os\nos.mkdir('d')\nopen('d/a', 'w').write('x')\nassert open('d/a').read() == 'x'", mechanism
    ).passed
    assert set(Path(os.environ.get("TMPDIR", "/tmp")).glob("decant-sandbox-*")) <= before


def test_the_parents_environment_is_out_of_reach(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECANT_TEST_SECRET", "do-not-tell")
    assert attempt(
        "import os\nassert 'DECANT_TEST_SECRET' not in os.environ\nassert 'PATH' not in os.environ", mechanism
    ).passed
    for pid in (os.getpid(), "self", 1):
        assert not attempt(f"assert b'do-not-tell' in open('/proc/{pid}/environ', 'rb').read()", mechanism).passed
    assert not attempt("import os\nopen(f'/proc/{os.getppid()}/environ', 'rb').read()", mechanism).passed


@pytest.mark.parametrize(
    "family",
    [
        "AF_INET, socket.SOCK_STREAM",
        "AF_INET, socket.SOCK_DGRAM",
        "AF_UNIX, socket.SOCK_STREAM",
        "AF_NETLINK, socket.SOCK_RAW",
    ],
)
def test_no_socket_can_be_opened(mechanism: str, family: str) -> None:
    verdict = attempt(f"import socket\nsocket.socket(socket.{family})", mechanism)
    assert not verdict.passed
    assert "PermissionError" in verdict.reason


@pytest.mark.parametrize(
    "spawn",
    [
        "while True: os.fork()",
        "import subprocess; subprocess.run(['/bin/echo'])",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])",
        "import threading; threading.Thread(target=print).start()",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "import ctypes; r = ctypes.CDLL(None).syscall(57); assert r >= 0",
        "import ctypes; r = ctypes.CDLL(None).vfork(); assert r >= 0",
    ],
)
def test_no_process_or_thread_can_be_started(mechanism: str, spawn: str) -> None:
    verdict = attempt(f"import os\n{spawn}", mechanism)
    assert not verdict.passed
    assert verdict.reason != ""


def test_memory_is_bounded(mechanism: str) -> None:
    verdict = attempt("a = []\nwhile True: a.append(bytearray(1 << 24))", mechanism, memory_bytes=256 << 20)
    assert not verdict.passed
    assert "MemoryError" in verdict.reason


@pytest.mark.parametrize(
    "loop",
    [
        "while True: pass",
        "import time\nwhile True: time.sleep(1)",
        "import signal\nsignal.signal(signal.SIGXCPU, lambda *a: None)\nwhile True: pass",
    ],
)
def test_endless_programs_end(mechanism: str, loop: str) -> None:
    started = time.monotonic()
    verdict = attempt(loop, mechanism, seconds=1.0)
    assert not verdict.passed
    assert time.monotonic() - started < 60


def test_output_and_files_are_bounded(mechanism: str) -> None:
    assert "printed more than" in attempt("while True: print('x' * 10000)", mechanism).reason
    assert not attempt(
        "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))", mechanism, file_bytes=2 << 20
    ).passed
    many = "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(bytes(1 << 20))"
    assert "wrote more than" in attempt(many, mechanism, file_bytes=2 << 20, seconds=10).reason
    assert "files" in attempt("i = 0\nwhile True:\n    i += 1\n    open(str(i), 'w')", mechanism, seconds=10).reason


def test_the_parent_and_others_cannot_be_killed_or_starved(mechanism: str) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for pid in (os.getpid(), bystander.pid, -1):
            assert not attempt(f"import os, signal\nos.kill({pid}, signal.SIGKILL)", mechanism).passed
        assert not attempt("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", mechanism).passed
        assert not attempt("import os, signal\nos.killpg(0, signal.SIGKILL)", mechanism).passed
        assert not attempt(
            f"import resource\nresource.prlimit({bystander.pid}, resource.RLIMIT_CPU, (1, 1))", mechanism
        ).passed
        # F_SETOWN, F_SETSIG: the kernel would send the signal on the program's behalf.
        assert not attempt(f"import fcntl\nfcntl.fcntl(1, fcntl.F_SETOWN, {os.getpid()})", mechanism).passed
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_the_walls_cannot_be_taken_down_from_inside(mechanism: str) -> None:
    call = "import ctypes\nr = ctypes.CDLL(None).{}\nassert r == 0, r"
    for name in (
        "prctl(1, 0, 0, 0, 0)",
        "setuid(0)",
        "chroot(b'/')",
        "mount(0, b'/', 0, 0, 0)",
        "unshare(0x10000000)",
        "ptrace(0, 0, 0, 0)",
    ):
        assert not attempt(call.format(name), mechanism).passed, name
    assert not attempt("import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))", mechanism).passed


def test_a_forged_verdict_does_not_count(mechanism: str) -> None:
    forged = """
    import os, json
    for fd in range(3, 64):
        try:
            os.write(fd, json.dumps({"nonce": "", "confined": True, "error": ""}).encode())
        except OSError:
            continue
    os._exit(0)
    """
    assert not attempt(forged, mechanism).passed


def test_a_program_dies_with_its_parent(mechanism: str, tmp_path: Path) -> None:
    """Kill the process that runs a sandbox, as kill -9 would, and see the program end long before its own limit."""
    root = Path(sandbox.__file__).parents[2]
    run = f"sandbox.run('import time; time.sleep(600)', sandbox.Limits(seconds=300), {mechanism!r})"
    code = f"from tools.evaluate.sandbox import sandbox; {run}"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, env={**os.environ, "TMPDIR": str(tmp_path)})

    def inside() -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    found += [entry.name] if str(tmp_path).encode() in str((entry / "cwd").readlink()).encode() else []
                except OSError:
                    continue
        return found

    deadline = time.monotonic() + 60
    while not inside() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert inside()
    parent.kill()
    parent.wait()
    while inside() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not inside()


def test_order_of_sets_is_the_same_in_every_run(mechanism: str) -> None:
    code = "assert list({'a', 'b', 'c', 'd', 'e'}) == " + repr(_hash_order())
    assert all(verdict.passed for verdict in sandbox.run_many([code] * 4, mechanism=mechanism))


def _hash_order() -> list[str]:
    out = subprocess.run(
        [sys.executable, "-c", "print(*{'a','b','c','d','e'})"],
        env={"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return out.stdout.split()


def test_without_any_mechanism_code_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "available", lambda: None)
    with pytest.raises(EvaluationError, match="--allow-unsafe-code"):
        sandbox.run("pass")
    assert sandbox.require(allow_unsafe=True) == sandbox.UNSAFE
    assert sandbox.run("assert 1", mechanism=sandbox.UNSAFE).passed
    assert not sandbox.run("assert 0", mechanism=sandbox.UNSAFE).passed


def test_a_wall_that_cannot_be_put_up_stops_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not sandbox._holds("landlock+seccomp"):
        pytest.skip("landlock+seccomp does not work on this machine")
    monkeypatch.setattr(sandbox, "seccomp_filter", lambda machine: b"\xff" * 16)
    with pytest.raises(EvaluationError, match="did not run it"):
        sandbox.run("pass", mechanism="landlock+seccomp")


def test_landlock_holds_wherever_the_kernel_has_it() -> None:
    if not sandbox._landlock_works() or os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("this kernel has no Landlock")
    assert sandbox._holds("landlock+seccomp")


def test_what_a_program_changes_is_not_there_for_the_next(mechanism: str) -> None:
    changes = "import builtins, json; builtins.len = json.loads = lambda *a: 7; globals()['kept'] = 1"
    looks = "import json; assert 'kept' not in globals() and len('ab') == 2 and json.loads('[1]') == [1]"
    verdicts = sandbox.run_many([changes, looks] * 3, mechanism=mechanism, workers=1)
    assert [verdict.reason for verdict in verdicts] == [""] * 6


def test_a_program_has_no_descriptor_but_its_own(mechanism: str) -> None:
    code = """
    import os
    found = []
    for descriptor in range(64):
        try:
            os.fstat(descriptor)
            found.append(descriptor)
        except OSError:
            pass
    """
    alone = textwrap.dedent(code) + "assert len(found) == 4, found"
    paired = textwrap.dedent(code) + "assert len(found) == 6, found"
    verdicts = sandbox.run_many([alone, (paired, paired), alone], mechanism=mechanism, workers=1)
    assert [verdict.reason for verdict in verdicts] == ["", "", ""]


def test_a_fork_server_that_ended_is_named() -> None:
    with ForkServer.started(["/bin/false"]) as server, pytest.raises(EvaluationError, match="same command again"):
        server.fork("/", [])
