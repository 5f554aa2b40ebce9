"""vLLM's V2 runner, the one that GPUs use, on a CPU: its Triton kernels run in Triton's interpreter.

`python interpreted_v2.py JOB OUT` opens the vLLM engine that the job describes, scores its rows and writes what came
back. It is a process of its own because the interpreter and the runner are chosen by environment variables before
anything is imported.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np


def interpret() -> None:
    """Let Triton take the CPU for a device whose kernels it interprets, and vLLM take its V2 runner."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    import torch
    import triton
    import triton.backends
    from triton.backends.compiler import GPUTarget

    properties = {"multiprocessor_count": 1, "max_shared_mem": 2**17, "warpSize": 32, "max_num_regs": 65536}

    class Driver:
        utils = types.SimpleNamespace(get_device_properties=lambda device: properties)

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_device_interface(self) -> types.ModuleType:
            return torch.cpu

    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)
    for name in ("nvidia", "amd"):
        if name in triton.backends.backends:
            triton.backends.backends[name].driver.is_active = staticmethod(lambda: False)
    triton.runtime.driver.set_active(Driver())
    from torch._inductor.runtime.triton_helpers import libdevice

    libdevice.isnan = lambda values: values != values  # of a GPU's library, which the interpreter lacks


def main(job_path: str, out: str) -> None:
    interpret()
    from shared.recipe.sections.capture import TopSampleCapture
    from shared.recipe.sections.teacher import VllmTeacher
    from teacher_cache.engines import ScoreRequest, open_engine

    job = json.loads(Path(job_path).read_text())
    capture = TopSampleCapture.model_validate(job["capture"])
    engine = open_engine(
        VllmTeacher.model_validate(job["teacher"]), capture, for_generation=None, model_dir=Path(job["model"])
    )
    (status,) = engine._llm.collective_rpc("decant_capture", args=(engine._layout.to_plain(),))
    requests = [
        ScoreRequest(i, 0, np.array(row["ids"], np.int32), np.array(row["spans"], np.int32), row["salt"])
        for i, row in enumerate(job["rows"])
    ]
    targets = {result.tag: result.targets for result in engine.score(requests)}
    found = {"status": status, "provenance": dict(engine.provenance()), "targets": targets}
    Path(out).write_bytes(pickle.dumps(found))
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
