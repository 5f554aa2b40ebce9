"""Compare a checkpoint with its class before anything is loaded: names and shapes of its tensors, none of their
numbers.

The tensors go through transformers' own loading as empty ones on torch's meta device, so that renamed, fused and tied
weights and what a class ignores count as they do when the model is loaded. This is for engines that load weights
themselves (vLLM takes one missing tensor without a word), and for looking before any work.
Cost: the headers of the files and the modules of the class, a second or two for any size; no weight is read or
    allocated.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from shared.errors import ModelError
from shared.models.files import load_config
from shared.models.load_report import LoadMismatch, loading, without_bars
from shared.models.weights.adapters import add_saved_adapter, refuse_adapter_inside
from shared.models.weights.quantised_parts import missing_parts
from shared.models.weights.weight_headers import stored_tensors
from shared.special_files import refuse_special_files

logger = logging.getLogger(__name__)


def check_checkpoint(directory: Path, *, what: str, trust_remote_code: bool, adapter: str | Path | None = None) -> None:
    """Refuse a model directory whose tensors are not those of the class that its config names, and an adapter that does
    not fit.

    Args:
        directory: of the model.
        what: how messages call it: `the teacher`.
        trust_remote_code: run Python that comes with it.
        adapter: an adapter's directory.

    An architecture that transformers does not know is left to the engine, with a warning.

    Raises:
        ModelError: the first missing, unexpected and reshaped tensor are named.
    """
    name = f"{what} '{directory}'"
    refuse_special_files(directory)
    refuse_adapter_inside(directory, name)
    try:
        config = load_config(directory, what=what, trust_remote_code=trust_remote_code)
    except ModelError as error:
        model_class, why = None, str(error)
    else:
        model_class = _class_of(config, trust_remote_code, name)
        why = f"transformers does not know {getattr(config, 'architectures', None)}"
    if model_class is None:
        logger.warning("%s: names of tensors are left to the engine to check, since %s", directory, why)
        return
    model, mismatch = _meta_model(model_class, config, directory, name)
    mismatch.refuse(name, model_class.__name__)
    if adapter is not None:
        add_saved_adapter(model, adapter)


def directory_of(source: str | Path, revision: str | None) -> Path:
    """Return the directory of a model that was loaded, itself or its copy of the hub's."""
    from transformers.utils import cached_file

    return Path(cached_file(str(source), "config.json", revision=revision)).parent


def fits_named_class(source: str | Path, revision: str | None, loaded: type, *, trust_remote_code: bool) -> bool:
    """Tell whether a checkpoint is whole for the class that its config names, where that is another than the one
    `loaded`.
    """
    directory = directory_of(source, revision)
    config = load_config(directory, what="the model", trust_remote_code=trust_remote_code)
    model_class = _named_class(config)
    if model_class is None or model_class.__name__ == loaded.__name__:
        return False
    try:
        _meta_model(model_class, config, directory, str(source))[1].refuse(str(source), model_class.__name__)
    except ModelError:
        return False
    return True


def empty_model(directory: Path, *, trust_remote_code: bool, dtype: Any) -> Any:
    """Return the language model of a directory's config on torch's meta device, or None where transformers makes none.

    >>> empty_model(Path("Qwen3-0.6B"), trust_remote_code=False, dtype=torch.bfloat16).device  # doctest: +SKIP
    device(type='meta')
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        config = load_config(directory, what="the model", trust_remote_code=trust_remote_code)
        with loading("the model"), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ModelError:
        return None


def _named_class(config: Any) -> Any:
    """Return the class of transformers that a config's `architectures` names, or None."""
    import transformers

    names = getattr(config, "architectures", None) or [""]
    found = getattr(transformers, str(names[0]), None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _class_of(config: Any, trust_remote_code: bool, name: str) -> Any:
    """Return the language model's class, or the larger one that the config names; None where there is neither.

    Raises:
        ModelError: the config has values that no such model can be made of.
    """
    import torch
    from transformers import AutoModelForCausalLM

    causal: Any = None
    with loading(name), torch.device("meta"):
        try:
            causal = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
        except ValueError:  # of no language model that transformers knows
            return _named_class(config)
    return causal if causal.config_class is type(config) else _named_class(config) or causal


def _meta_model(model_class: Any, config: Any, directory: Path, name: str) -> tuple[Any, LoadMismatch]:
    """Return an empty model and where the checkpoint differs from it."""
    import torch

    stored = stored_tensors(directory)
    tensors = {name: torch.empty(one.shape, device="meta") for name, one in stored.items()}
    quantised = getattr(config, "quantization_config", None) is not None
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    with loading(name), without_bars():
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    mismatch = LoadMismatch.of(report, quantised=quantised, modules={name for name, _ in model.named_modules()})
    if quantised and not mismatch.missing:
        mismatch = LoadMismatch(missing_parts(stored), mismatch.unexpected)
    return model, mismatch
