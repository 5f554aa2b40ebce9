"""Signals that come while a program of the command line is still being loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_sigterm_during_an_import_comes_after_it(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\n    sum(range(1000))\n"
        "except BaseException:\n    print('swallowed')\n"
    )
    program = (
        "import sys, time; from tools import cli; cli._prepare(False)\n"
        "try:\n    import library\n    print('imported', flush=True)\n    time.sleep(30)\n"
        "except cli.Terminated:\n    print('terminated')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["imported", "terminated"]


def test_an_import_that_does_not_end_holds_sigterm_up_for_no_longer_than_a_moment(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\n"
        "end = time.monotonic() + 40\nwhile time.monotonic() < end:\n    sum(range(1000))\n"
    )
    program = (
        "import sys; from tools import cli\n"
        "def work(args):\n    print('kept')\n    import library\n    print('imported')\n"
        "cli.COMMANDS['doctor'] = work\nsys.exit(cli.main(['doctor']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - begun < 30
    assert (done.returncode, done.stdout) == (143, "kept\n")
    assert done.stderr == "decant: error: terminated by SIGTERM; the same command continues where it stopped\n"


def test_ctrl_c_before_the_command_line_is_there_prints_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job starts with it ignored
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'shared.errors':\n            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    starts = (["-m", "tools.cli", "doctor"], ["-c", "import sys; from decant_entry import main; sys.exit(main())"])
    for words in starts:
        command = [sys.executable, "-P", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
