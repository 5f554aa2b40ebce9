"""Runs builds that are killed: imports torch and transformers once, then forks one child per build.

Reads one JSON list per line of {"recipe": ..., "failpoint": name or null, "fake": bool, "partition": [i, n] or null},
runs those builds at the same time, and answers with the list of the children's exit statuses (negative: the signal that
killed it). Nothing that starts threads runs in this process, so that its children may fork.
"""

from __future__ import annotations

import json
import os
import sys
import traceback


def main() -> None:
    os.environ["DECANT_FAILPOINT"] = ""
    import datasets  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

    torch.set_num_threads(1)
    import teacher_cache.build  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        children = []
        for request in json.loads(line):
            child = os.fork()
            if child == 0:
                os._exit(run(request))
            children.append(child)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


def run(request: dict) -> int:
    import teacher_cache.engines as engines
    from shared.errors import DecantError
    from shared.recipe.recipe import Recipe
    from teacher_cache.build import teach

    os.environ["DECANT_FAILPOINT"] = request["failpoint"] or ""
    sys.stdout = sys.stderr
    if request["fake"]:
        from tests.teacher_cache.fake_engine import FakeEngine

        engines.open_engine = lambda teacher, capture, **_: FakeEngine(teacher, capture)
        engines.refusal = lambda teacher, capture: None
    try:
        partition = request.get("partition")
        teach(Recipe.model_validate(request["recipe"]), tuple(partition) if partition else None)
    except DecantError as error:
        print(error)
        return 1
    except Exception:  # noqa: BLE001 - the server must answer
        traceback.print_exc()
        return 2
    return 0


if __name__ == "__main__":
    main()
