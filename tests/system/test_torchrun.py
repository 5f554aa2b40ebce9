"""`torchrun --no-python decant train`: the command of the README, in a directory that has folders of our packages'
names.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.student_train.tiny_caches import make_cache
from tests.system.program import ROOT
from tests.tiny_models import make_qwen3

pytestmark = pytest.mark.slow

RECIPE = """\
name: two
output_dir: run
cache: [cache]
student: {model: student}
stages:
- name: kd
  losses: [{name: forward_kl, weight: 1.0}]
  trainer: {max_steps: 4, pack_tokens: 192, learning_rate: 1.0e-3, save_steps: 2, report_to: none}
"""
SCRIPT = f"#!{sys.executable}\nimport sys\nfrom decant_entry import main\nsys.exit(main())\n"


def test_two_processes_started_by_torchrun_train_as_one(tmp_path):
    place = tmp_path / "work"
    place.mkdir()
    make_cache(place / "cache", make_qwen3(place / "teacher", seed=1))
    make_qwen3(place / "student", seed=2, spread=0.05)
    (place / "recipe.yaml").write_text(RECIPE)
    for name in ("shared", "tools"):
        (place / name).mkdir()
        (place / name / "__init__.py").write_text("raise SystemExit('somebody else')\n")
    script = tmp_path / "decant"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--no-python", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = subprocess.run(
            [*command, "train", "recipe.yaml"], cwd=place, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert (place / "run/train/kd/model/model.safetensors").is_file()
    assert "finished before" in done.stderr
