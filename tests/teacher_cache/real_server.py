"""A real vLLM server on the loopback, in a process group of its own, because a killed one leaves its engine's
processes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class RealServer:
    """Starts, kills and restarts `vllm serve` on one port."""

    def __init__(self, model: Path, log: Path, *options: str, max_model_len: int = 129) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._log = log
        # The CPU build's `vllm` command looks for a distribution of that name; its module starts without.
        # Seeds and a prompt cut in two passes kill the CPU runner, hence no chunks.
        self._command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        self._command += [
            "--max-model-len",
            str(max_model_len),
            "--max-num-batched-tokens",
            "1024",
            "--no-enable-chunked-prefill",
        ]
        self._command += ["--max-num-seqs", "32", *options]
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait_until_up(self, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self._process is not None
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(self._log.read_text()[-2000:])

    def kill(self) -> None:
        """Kill the server and what it started, as a machine that goes away."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None
