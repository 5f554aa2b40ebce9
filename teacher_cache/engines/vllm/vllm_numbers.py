"""End a stream of answers or scores whose model computes NaN.

vLLM samples on: it takes token 0 where it finds no largest number, and rows of one batch catch NaN from each other. It
counts NaN in the logits of every sampled token where `VLLM_COMPUTE_NANS_IN_LOGITS` is set, and tells its front end.
Cost: one pass over the logits of sampled tokens, in the worker.
"""

from __future__ import annotations

from typing import Any

from shared.errors import EngineError
from shared.models.no_numbers import NO_NUMBERS


def refuse_no_numbers(llm: Any) -> None:
    """Let `llm.llm_engine.step` raise an EngineError once a request's logits hold NaN."""
    processor = llm.llm_engine.output_processor
    stock = processor.process_outputs

    def process_outputs(outputs: Any, *rest: Any, **named: Any) -> Any:
        """Look at the counts, then do what vLLM does."""
        if any(getattr(output, "num_nans_in_logits", 0) for output in outputs):
            raise EngineError(NO_NUMBERS)
        return stock(outputs, *rest, **named)

    processor.process_outputs = process_outputs
