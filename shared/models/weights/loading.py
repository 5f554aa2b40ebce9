"""Load a causal language model, and refuse one that was not all there. Cost: loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.models.config_file import check_config
from shared.models.large_imports import import_transformers
from shared.models.load_report import LoadMismatch, loading
from shared.models.weights.adapters import merge_adapter, refuse_adapter_inside
from shared.models.weights.checkpoint import directory_of, fits_named_class
from shared.models.weights.overwritten import restore_overwritten
from shared.models.weights.weight_headers import weight_files
from shared.remote.hub import ask_hub
from shared.special_files import refuse_special_files


def load_causal_lm(
    source: str | Path,
    *,
    what: str,
    trust_remote_code: bool,
    revision: str | None = None,
    adapter: str | Path | None = None,
    **settings: Any,
) -> Any:
    """Load a causal language model whose tensors are all in its checkpoint, with an adapter merged where one is given.

    Args:
        source: a model directory or a hub id.
        what: how messages call it: `the student`.
        trust_remote_code: run Python that comes with it.
        revision: of a hub id.
        adapter: an adapter's directory.
        settings: more arguments of `from_pretrained`: `dtype`, `device_map`, `attn_implementation`,
            `quantization_config`.

    Raises:
        ModelError: it cannot be loaded, a tensor is missing, unexpected or of another shape, or the adapter does not
            fit.

    >>> load_causal_lm("Qwen/Qwen3-0.6B", what="the student", trust_remote_code=False, dtype="auto")  # doctest: +SKIP
    """
    import_transformers()
    from transformers import AutoModelForCausalLM

    name = f"{what} '{source}'"
    refuse_special_files(source)
    refuse_adapter_inside(source, name)
    ask_hub(source)
    check_config(source)
    with loading(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are in the report, with their names
            **settings,
        )
    quantizer = getattr(model, "hf_quantizer", None)
    quantised = quantizer is not None and quantizer.pre_quantized
    mismatch = LoadMismatch.of(report, quantised=quantised, modules={name for name, _ in model.named_modules()})
    is_only_more = mismatch.unexpected and not mismatch.missing and not mismatch.reshaped
    if is_only_more and fits_named_class(source, revision, type(model), trust_remote_code=trust_remote_code):
        mismatch = LoadMismatch()  # the text model of a larger one, whose other parts are the rest
    mismatch.refuse(name, type(model).__name__)
    if quantizer is None:
        restore_overwritten(model, weight_files(directory_of(source, revision)))
    return model if adapter is None else merge_adapter(model, adapter)
