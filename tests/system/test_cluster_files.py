"""The files of recipes/cluster: they parse, the program takes the commands in them, and a task that must end is
requeued.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.system.program import ROOT
from tools.cli_parser import build_parser

CLUSTER = ROOT / "recipes" / "cluster"
SLURM, RAY = CLUSTER / "slurm_array.sh", CLUSTER / "ray_cluster.yaml"


@pytest.mark.parametrize("path", [SLURM, RAY])
def test_every_decant_command_in_the_file_is_one_that_the_program_takes(path):
    commands = re.findall(r"\.venv/bin/decant ([^'\n]+)", path.read_text())
    assert len(commands) == 2
    for command in commands:
        assert build_parser().parse_args(shlex.split(command)).command in ("teach", "cache")


def slurm(tmp_path: Path, decant: str) -> subprocess.Popen[str]:
    """Run the script as a task of an array, with stand-ins for decant and scontrol."""
    for name, body in (("decant", decant), ("scontrol", f'echo "$@" > {tmp_path}/requeued')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DECANT": str(tmp_path / "decant")}
    environment |= {"SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "77"}
    return subprocess.Popen(["bash", SLURM, "recipes/demo.yaml"], env=environment, stdout=subprocess.PIPE, text=True)


def test_an_array_task_does_its_share_and_ends_with_the_exit_code_of_the_build(tmp_path):
    assert subprocess.run(["bash", "-n", SLURM]).returncode == 0
    task = slurm(tmp_path, 'echo "$@"; exit 1')
    words = shlex.split(task.communicate(timeout=60)[0])
    assert task.returncode == 1 and not (tmp_path / "requeued").exists()
    parsed = build_parser().parse_args(words)
    shares = int(re.search(r"^shares=(\d+)$", SLURM.read_text(), re.M)[1])
    assert (parsed.command, parsed.recipe, parsed.partition) == ("teach", Path("recipes/demo.yaml"), (3, shares))
    assert re.search(r"^#SBATCH --array=0-(\d+)$", SLURM.read_text(), re.M)[1] == str(shares - 1)


def test_an_array_task_that_must_end_lets_the_build_end_and_requeues_itself(tmp_path):
    body = f"trap 'echo ended > {tmp_path}/ended; exit 1' TERM; touch {tmp_path}/begun; while :; do sleep 0.05; done"
    task = slurm(tmp_path, body)
    bound = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < bound:
        time.sleep(0.02)
    task.send_signal(signal.SIGTERM)
    task.communicate(timeout=60)
    assert task.returncode == 0
    assert (tmp_path / "ended").exists() and (tmp_path / "requeued").read_text() == "requeue 77\n"


def test_the_ray_file_is_yaml_with_what_ray_up_needs():
    document = YAML(typ="safe").load(RAY)
    assert {"cluster_name", "provider", "auth", "head_start_ray_commands", "worker_start_ray_commands"} <= set(document)
    assert document["max_workers"] == len(document["provider"]["worker_ips"])
    assert any("ray start --head" in command for command in document["head_start_ray_commands"])
    example = re.search(r"workers: (\{.*?\})", RAY.read_text())[1]
    from shared.recipe.sections.teacher import VllmTeacher

    teacher = VllmTeacher(model="m", tensor_parallel_size=4, workers=YAML(typ="safe").load(example))
    assert teacher.workers.count * teacher.workers.gpus_per_engine == 8 * (1 + document["max_workers"])
