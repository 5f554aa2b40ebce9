"""The Ray cluster of a build: the running one that RAY_ADDRESS names, or one of this machine's own that ends with the
build.

The local cluster listens on this machine for this build only (a random token), keeps its files in a temporary directory
that is removed at the end, and dies with this process, even after `kill -9`: the kernel ends its processes with their
parent. Of a running cluster, only this build's engines end with it. Cost: 3-7 s and 0.4 GB for a local start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from shared.errors import EngineError, UsageError, reason_of
from shared.process.machine import num_cores
from shared.recipe.sections.teacher import Workers
from teacher_cache.cluster.head_watch import head_answers

OBJECT_STORE_BYTES = 100 * 2**20
"""For messages only; rows go through the cache's directory."""

TRIES, SECONDS_BETWEEN_TRIES = 5, 1.0
"""At an address, for a head that is being started."""

_LONGEST_SOCKET_DIRECTORY = 30
"""Ray puts sockets some 70 characters below; the system allows 107."""
_PREFIX = "decant-ray-"


def require_ray() -> None:
    """Refuse where Ray is not installed.

    Raises:
        UsageError: with the extra that installs it.
    """
    try:
        metadata.version("ray")
    except metadata.PackageNotFoundError:
        raise UsageError(
            "Ray is not installed and `teacher.workers` needs it; install the extra `cluster` (pip install -e "
            "'.[cluster]'), or leave `workers` out and start `decant teach --partition i/n` once per engine"
        ) from None


@contextlib.contextmanager
def ray_cluster(workers: Workers) -> Iterator[Any]:
    """Connect to a running cluster or start a local one; yields the module `ray`.

    Raises:
        UsageError: Ray is not installed, or this machine has too few GPUs.
        EngineError: Ray cannot start or cannot be reached.
    """
    require_ray()
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise UsageError(
            f"RAY_ADDRESS={address} names Ray's client port, which engines cannot be driven through; run the same "
            "command on a node of the cluster (`ray exec`, `ray job submit`), or give host:port"
        )
    _quieten(local=not address)
    found = _address_meant(address)
    if not _is_head_there(found):
        said = address if found == address else f"{address} ({found})"
        raise EngineError(
            f"nothing answers at RAY_ADDRESS={said}; start the cluster (`ray start --head`), correct the address "
            "(`ray status` on the head says it), or unset it for engines on this machine alone"
        )
    import ray as installed

    ray: Any = installed
    logging.getLogger("ray").setLevel(logging.ERROR)
    directory = None if address else _temporary_directory()
    with _own_signals():
        try:
            ray.init(**_connection(address) if directory is None else _local(workers, directory))
        except Exception as error:
            place = f"the cluster at RAY_ADDRESS={address} cannot be reached" if address else "Ray cannot start here"
            raise EngineError(
                f"{place} ({type(error).__name__}: {reason_of(error)}); check `ray status`, or leave `workers` out"
            ) from error
    try:
        _check_room(ray.cluster_resources(), workers, local=not address)
        yield ray
    finally:
        ray.shutdown()
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


def _address_meant(address: str) -> str:
    """Return what Ray takes `auto` for: a cluster of this machine, or the last one, which may have ended since; any
    other address as it is.
    """
    if address == "auto":
        with contextlib.suppress(ImportError, ConnectionError):  # Ray is asked, which says so itself
            from ray._private.services import get_ray_address_from_environment

            return str(get_ray_address_from_environment(address, None))
    return address


def _is_head_there(address: str) -> bool:
    for _ in range(TRIES):
        if head_answers(address):
            return True
        time.sleep(SECONDS_BETWEEN_TRIES)
    return False


def cpus_per_engine(ray: Any, workers: Workers) -> int:
    """Return the CPUs that Ray reserves for an engine: all of them shared out where engines run on CPUs, else one."""
    if workers.gpus_per_engine:
        return 1
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    most = max(nodes, default=1)
    fitting = (cpus for cpus in range(most, 0, -1) if sum(node // cpus for node in nodes) >= workers.count)
    return next(fitting, 1)


def _quieten(*, local: bool) -> None:
    """Set Ray's environment defaults before it is imported; what the environment says wins."""
    defaults = {"RAY_USAGE_STATS_ENABLED": "0"}
    if local:
        defaults |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _connection(address: str) -> dict[str, Any]:
    return {"address": address, "configure_logging": False, "log_to_driver": False}


def _local(workers: Workers, directory: Path) -> dict[str, Any]:
    """Return the arguments that start a cluster of this machine; GPUs are counted by Ray."""
    arguments: dict[str, Any] = {
        "address": "local",
        "num_cpus": max(num_cores(), workers.count),
        "include_dashboard": False,
        "configure_logging": False,
        "log_to_driver": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_temp_dir": str(directory),
    }
    if workers.gpus_per_engine == 0:
        arguments["num_gpus"] = 0
    return arguments


def _check_room(resources: dict[str, float], workers: Workers, *, local: bool) -> None:
    """Refuse a machine with too few GPUs; a running cluster may still grow, so there it is only said.

    Raises:
        UsageError: too few GPUs on this machine.
    """
    needed, found = workers.count * workers.gpus_per_engine, int(resources.get("GPU", 0))
    if found >= needed:
        return
    sentence = (
        f"`teacher.workers` asks for {workers.count} engines of {workers.gpus_per_engine} GPUs and there are "
        f"{found} GPUs"
    )
    if local:
        raise UsageError(
            f"{sentence} here; lower `count`, set `gpus_per_engine: 0` for engines on CPUs, or set RAY_ADDRESS to a "
            "running cluster"
        )
    logging.getLogger(__name__).warning("%s in the cluster now; engines start as they get a place", sentence)


def _temporary_directory() -> Path:
    """Return a new directory with a short name, and remove those of builds that were killed."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > _LONGEST_SOCKET_DIRECTORY:
        # A fresh directory is made below it; a longer path does not fit a socket's address.
        root = Path("/tmp")  # noqa: S108
    for left in root.glob(f"{_PREFIX}*"):
        pid = left.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not _runs(int(pid)) and left.lstat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))


def _runs(pid: int) -> bool:
    """Tell whether a process exists, as the kernel says it, also where /proc is not mounted."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # another user's, or a number that the kernel cannot hold: not known to be gone
    return True


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handlers: Ray's would leave without a word on SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
