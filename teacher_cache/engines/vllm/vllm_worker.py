"""What vLLM loads into each of its workers: importing this module starts the watch on the process that started the
engine.

Only workers import it, through `worker_extension_cls`, as the first thing they do and before they load a model, so that
a process that is killed while weights are read leaves nothing behind either. Cost: that of `parent_watch`.
"""

from __future__ import annotations

from shared.process.parent_watch import end_with_parent
from teacher_cache.engines.vllm.vllm_tail import TailWorker

__all__ = ["TailWorker"]

end_with_parent()
