"""The default teacher: one vLLM engine that generates and then scores, fed continuously and drained as results finish.

Requests are added while others run (`add_request`) and results are taken one step at a time (`step`), so memory holds
only what is in flight; `LLM.generate` would keep every output of the call. A scored sequence costs one prefill of all
its tokens and one sampled token that nobody reads. Each row carries the label, the head, tails and draws (see
column_layout).

Shape letters: T tokens of a sequence, S supervised positions, W columns.
"""

from __future__ import annotations

import logging
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shared.errors import DecantError, EngineError, reason_of
from shared.models.end_tokens import declared_end_ids
from shared.models.gpus import unused_gpu
from shared.models.weights.checkpoint import check_checkpoint
from shared.process import parent_watch
from shared.recipe.recipe import Capture, Generate
from shared.recipe.sections.teacher import VllmTeacher
from shared.tokens.tokenizer_file import num_ids
from teacher_cache.engines.answer_ends import AnswerEnds
from teacher_cache.engines.columns.column_layout import ColumnLayout, required
from teacher_cache.engines.columns.sparse_columns import predicting_rows, targets_from_plugin, targets_from_stock
from teacher_cache.engines.protocol import Generated, GenerateRequest, Scored, ScoreRequest, require_scorable, room_of
from teacher_cache.engines.vllm import vllm_arrays, vllm_tail
from teacher_cache.engines.vllm.vllm_numbers import refuse_no_numbers
from teacher_cache.engines.vllm.vllm_self_test import choose_capture_path, scoring_parameters
from teacher_cache.engines.vllm.vllm_settings import VllmSettings, plan_settings
from teacher_cache.engines.vllm.vllm_version import installed_vllm
from teacher_cache.engines.vllm.vllm_weights import fold_adapter, only_chosen, refuse_head_alone

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 512
"""Requests given to vLLM and not finished: twice what it runs at once."""

Request = TypeVar("Request", GenerateRequest, ScoreRequest)


class VllmEngine:
    """A teacher in vLLM, in this process or in a core process of its own."""

    def __init__(
        self, teacher: VllmTeacher, capture: Capture | None, *, for_generation: Generate | None, model_dir: Path
    ) -> None:
        """Start vLLM and find out how it can capture.

        Raises:
            EngineError: vLLM cannot start, or cannot capture what is asked, or weights or adapter are not whole.
        """
        # vLLM trips over torch's deprecations on every start; nothing that a user could mend.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
        self._llm: Any = None
        self._restore: Callable[[], None] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        try:
            from vllm import LLM
            from vllm.platforms import current_platform

            on_cpu = bool(current_platform.is_cpu())
            problem = unused_gpu() if on_cpu else None
            if problem is not None:
                raise EngineError(f"vLLM would run on the CPU: {problem}")
            if teacher.adapter is None:
                check_checkpoint(model_dir, what="the teacher", trust_remote_code=teacher.trust_remote_code)
                refuse_head_alone(model_dir)
                model_dir = only_chosen(model_dir, self._new_scratch())
            else:
                trusts = teacher.trust_remote_code
                model_dir = fold_adapter(
                    model_dir, Path(teacher.adapter), self._new_scratch(), trust_remote_code=trusts
                )
            self._declared_ends = declared_end_ids(model_dir)
            self._settings: VllmSettings = plan_settings(teacher, capture, for_generation, model_dir, on_cpu=on_cpu)
            self._restore = _hold_torch(self._settings.num_threads) if on_cpu else None
            with parent_watch.announced():
                self._llm = LLM(**self._settings.arguments)
            refuse_no_numbers(self._llm)
            self.tokenizer: Any = self._llm.get_tokenizer()
            self.vocab_size = num_ids(self.tokenizer)
            self.max_model_len: int = self._settings.max_model_len or int(self._llm.model_config.max_model_len) - 1
            self._layout: ColumnLayout | None = None
            self._path = "none"
            if capture is not None:
                self._layout = ColumnLayout.of(capture, self.vocab_size)
                self._path = choose_capture_path(self._llm, self._layout)
        except DecantError:
            self.close()
            raise
        except Exception as error:  # whatever a model, a driver or a kernel makes vLLM raise
            self.close()
            raise _start_failed(model_dir, error) from error
        self._next_id = 0

    def _new_scratch(self) -> Path:
        """Return a new temporary directory, which `close` removes."""
        self._scratch = tempfile.TemporaryDirectory(prefix="decant-teacher-")
        return Path(self._scratch.name)

    def generate(self, requests: Iterable[GenerateRequest], settings: Generate) -> Iterator[Generated]:
        """Answer each request once, as it finishes.

        Raises:
            EngineError: a prompt leaves no room for an answer, the model computes NaN, or the engine died.
        """
        ends = AnswerEnds.of(self.tokenizer, self._declared_ends, settings)
        for request, output in self._run(requests, lambda request: self.answer_parameters(request, settings, ends)):
            answer = output.outputs[0]
            by_text = isinstance(answer.stop_reason, str) and answer.finish_reason == "stop"
            yield ends.answer(request, list(answer.token_ids), str(answer.finish_reason), by_text=by_text)

    def answer_parameters(self, request: GenerateRequest, settings: Generate, ends: AnswerEnds) -> Any:
        """Return vLLM's parameters of a request for an answer that `ends` end.

        Raises:
            EngineError: the prompt leaves no room for one.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=min(settings.max_new_tokens, room_of(request, self.max_model_len)),
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=request.seed if self._settings.honours_seeds else None,
            stop=list(ends.texts) or None,
            stop_token_ids=list(ends.with_template(request.end_token_ids)),
            detokenize=bool(ends.texts),
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scored]:
        """Score each request once, as it finishes.

        Raises:
            EngineError: the engine was opened without a capture, a sequence is too long, or the engine died.
        """
        layout, plugin = required(self._layout), self._path.startswith("plugin")
        num_logprobs = layout.num_extra if plugin else layout.num_head
        from_columns = targets_from_plugin if plugin else targets_from_stock

        def parameters(request: ScoreRequest) -> Any:
            require_scorable(request, self.max_model_len)
            return scoring_parameters(num_logprobs)

        for request, output in self._run(requests, parameters):
            ids, logprobs = vllm_arrays.columns_of(output.prompt_logprobs, 1 + num_logprobs)
            rows = predicting_rows(request.spans)
            ids, logprobs = ids[rows], logprobs[rows]
            if not np.array_equal(ids[:, 0], request.token_ids[rows + 1]):
                raise EngineError(
                    "vLLM returned log-probabilities of other tokens than it was given; nothing of this run can be "
                    "trusted"
                )
            yield Scored(request.tag, from_columns(ids, logprobs, layout))

    def _run(self, requests: Iterable[Request], parameters: Callable[[Request], Any]) -> Iterator[tuple[Request, Any]]:
        """Keep requests in flight and yield each with vLLM's output when it is done."""
        if self._llm is None:
            raise EngineError("the engine is closed; open another")
        waiting = iter(requests)
        running: dict[str, Request] = {}
        engine = self._llm.llm_engine
        exhausted = False
        try:
            while True:
                while not exhausted and len(running) < MAX_IN_FLIGHT:
                    request = next(waiting, None)
                    if request is None:
                        exhausted = True
                        break
                    name = vllm_tail.request_name(self._next_id, getattr(request, "draw_salt", 0))
                    self._next_id += 1
                    token_ids = [int(token) for token in request.token_ids]
                    sampling = parameters(request)
                    _translated(engine.add_request, name, {"prompt_token_ids": token_ids}, sampling)
                    running[name] = request
                if not running:
                    return
                for output in _translated(engine.step):
                    if output.finished:
                        yield running.pop(output.request_id), output
        finally:
            if running and self._llm is not None:
                engine.abort_request(list(running))

    def provenance(self) -> Mapping[str, Any]:
        """Say what ran."""
        arguments = self._settings.arguments
        return {
            "engine": "vllm",
            "vllm": installed_vllm(),
            "torch": metadata.version("torch"),
            "transformers": metadata.version("transformers"),
            "python": platform.python_version(),
            "device": "cpu" if self._settings.on_cpu else _device_name(),
            "dtype": arguments["dtype"],
            "head_dtype": self._settings.head_dtype,
            "quantization": arguments["quantization"],
            "tensor_parallel_size": arguments["tensor_parallel_size"],
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": arguments["max_num_batched_tokens"],
            "chunked_prefill": arguments["enable_chunked_prefill"],
            "seeds_honoured": self._settings.honours_seeds,
            "capture_path": self._path,
        }

    def close(self) -> None:
        """Stop vLLM and release processes and memory; safe to call twice."""
        llm, self._llm = self._llm, None
        vllm_arrays.uninstall()
        vllm_tail.switch_off()
        if llm is not None:
            try:
                llm.llm_engine.engine_core.shutdown()
            except Exception as error:  # noqa: BLE001 - a dead engine must not hide why it died
                logger.warning("vLLM did not shut down cleanly: %s", error)
            del llm
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        if self._restore is not None:
            self._restore()
            self._restore = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None


def _translated(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call vLLM and turn what it raises into one sentence."""
    try:
        return function(*arguments, **named)
    except DecantError:
        raise
    except Exception as error:
        raise EngineError(
            f"vLLM failed while at work ({type(error).__name__}: {reason_of(error)}); if it ran out of memory, lower "
            "teacher.gpu_memory_utilization: log-probabilities need about 1.5 GB (at 150,000 tokens of vocabulary) "
            "that its profiling does not see; the same command continues where it stopped"
        ) from error


def _start_failed(model_dir: Path, error: Exception) -> EngineError:
    reason = reason_of(error, 400)
    return EngineError(
        f"vLLM cannot start with {model_dir} ({type(error).__name__}: {reason}); set VLLM_LOGGING_LEVEL=INFO to see "
        "its own log, and check teacher.dtype, teacher.max_model_len and teacher.gpu_memory_utilization"
    )


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "unknown"


def _hold_torch(num_threads: int | None) -> Callable[[], None]:
    """Return what undoes the changes that vLLM's CPU worker makes to torch in its own process, and compile nothing
    meanwhile.

    Execution is eager there, but ranking a label is decorated for compilation, which would start a C++ compiler at the
    first scored row; and vLLM decorates the classes of models that it runs by transformers' own code, which then make
    no model outside of vLLM any more. Use `num_threads` threads where given.
    """
    import torch
    import torch._dynamo

    set_num_threads, threads_before = torch.set_num_threads, torch.get_num_threads()
    disabled = torch._dynamo.config.disable
    torch._dynamo.config.disable = True
    put_back = _leave_classes_alone()
    if num_threads is not None:
        torch.set_num_threads(num_threads)

    def restore() -> None:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads_before)
        torch._dynamo.config.disable = disabled
        put_back()

    return restore


def _leave_classes_alone() -> Callable[[], None]:
    """Let vLLM decorate no class of transformers for compilation; return what undoes that."""
    try:
        from vllm.model_executor.models.transformers.base import Base
    except ImportError:  # named otherwise in another version
        return lambda: None
    name = "_decorate_cls_for_torch_compile"
    plain = getattr(Base, name, None)
    if plain is None:
        return lambda: None
    setattr(Base, name, lambda self, *arguments, **settings: None)
    return lambda: setattr(Base, name, plain)
