"""The student: weights from a directory, a hub or a seed, its tokenizer checked, an adapter where one is asked for.

Cost: loading. A random student's vocabulary is its tokenizer's, without padded rows: nothing would ever train those
down, and what samples from the student would meet them.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from shared.cache.tokenizer_files import read_tokenizer_files
from shared.errors import IdentityError, ModelError, TrainingError, reason_of
from shared.identity.weights_hash import tokenizer_hash
from shared.models.files import load_config, load_tokenizer
from shared.models.load_report import loading
from shared.models.type_tokenizer import require_unchanged
from shared.models.weights.loading import load_causal_lm
from shared.recipe.base import quoted
from shared.recipe.recipe import Adapter, Student
from student_train.student.stored_weights import refuse_quantised, refuse_unopened_text_model

_OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files that older tokenizers come as."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_student(student: Student, start: Path | None, cache: Any, *, seed: int = 0) -> Any:
    """Load the student's base model in training mode, without its adapter.

    Args:
        student: the recipe's section.
        start: a model directory to start from, instead of the student's own weights.
        cache: what it will train on; needs `tokenizer_hash`, `vocab_size` and `path`.
        seed: of fresh weights, where the student's `init` is random and there is no `start`.

    Raises:
        IdentityError: its tokenizer is not the cache's.
        TrainingError: it cannot be loaded or lacks weights, or a package that it needs is missing.
    """
    check_packages(student)
    quantization = _quantization(student)
    source, revision = (str(start), None) if start is not None else (student.model, student.revision)
    trust = student.trust_remote_code
    config = load_config(source, what="the student", revision=revision, trust_remote_code=trust)
    refuse_quantised(source, config.to_dict())
    refuse_unopened_text_model(source, config)
    if student.init == "random" and start is None:
        return _fresh(student, cache, seed)
    check_tokenizer(student, source, revision, cache, required=True)
    settings: dict[str, Any] = {"dtype": DTYPES[student.dtype], "attn_implementation": student.attention}
    if quantization is not None:
        settings |= {
            "quantization_config": quantization,
            "device_map": {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
        }
    model = load_causal_lm(source, what="the student", revision=revision, trust_remote_code=trust, **settings)
    if quantization is not None:
        _keep_gradients(model)
    elif getattr(model, "hf_quantizer", None) is not None:
        refuse_quantised(source, {"quantization_config": {"quant_method": "still packed once loaded"}})
    return model.train()


def check_recomputes(model: Any) -> None:
    """Refuse to recompute activations of a student whose class cannot.

    Raises:
        TrainingError: with the setting to change.
    """
    if not model.supports_gradient_checkpointing:
        raise TrainingError(
            f"{type(model).__name__} of transformers cannot recompute activations; set gradient_checkpointing to false"
        )


def _keep_gradients(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for CPUs after an evaluation: no gradient comes through the packed
    ones.
    """
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False


def _fresh(student: Student, cache: Any, seed: int) -> Any:
    """Return a model with weights drawn from `seed`, in the config of `student.model`."""
    from transformers import AutoModelForCausalLM

    trust = student.trust_remote_code
    check_tokenizer(student, student.model, student.revision, cache, required=False)
    config = load_config(student.model, what="the student", revision=student.revision, trust_remote_code=trust)
    config.get_text_config().vocab_size = cache.vocab_size
    with loading(f"the student '{student.model}'"), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[student.dtype], attn_implementation=student.attention, trust_remote_code=trust
        )
    return model.train()


def check_tokenizer(student: Student, source: str, revision: str | None, cache: Any, *, required: bool) -> None:
    """Refuse a student whose tokenizer is not the cache's, or is not once transformers loads it for the student's type.

    Raises:
        IdentityError: the tokenizers differ.
        TrainingError: the student has none although one is `required`.
    """
    found = student_tokenizer_hash(source, revision, cache.tokenizer_hash, trust_remote_code=student.trust_remote_code)
    if found is None:
        if required:
            raise TrainingError(
                f"the student '{source}' comes without tokenizer.json, so nothing says that its tokens are those of "
                f"{cache.path}; add the tokenizer to it (the cache's is in {cache.path}/tokenizer)"
            )
        return
    if found != cache.tokenizer_hash:
        raise IdentityError(
            f"the student '{source}' has tokenizer {found} where {cache.path} was built with {cache.tokenizer_hash}; "
            "choose a student of the teacher's family, or build the cache for this tokenizer"
        )
    files = read_tokenizer_files(cache.path) if (Path(cache.path) / "cache.json").is_file() else {}
    if "tokenizer.json" in files:
        trust = student.trust_remote_code
        config = load_config(source, what="the student", revision=revision, trust_remote_code=trust)
        require_unchanged(files, config.model_type, source)


def student_tokenizer_hash(
    source: str, revision: str | None = None, wanted: str | None = None, *, trust_remote_code: bool
) -> str | None:
    """Return the hash of a model's tokenizer, or None where it has none.

    For some types of models transformers puts the type's own normaliser and pre-tokeniser over those of the file, and a
    cache holds tokenizers as loaded: `wanted` is returned where either the file or what is loaded from it has that
    hash.
    """
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        try:
            found: str | None = cached_file(
                source, name, revision=revision, _raise_exceptions_for_missing_entries=False
            )
        except OSError:
            return None
        return found

    path = find("tokenizer.json")
    if path is not None:
        found = tokenizer_hash(Path(path).read_bytes(), path)
        if wanted in (None, found) or _loaded_tokenizer_hash(source, revision, trust_remote_code) != wanted:
            return found
        return wanted
    if not any(find(name) for name in _OTHER_TOKENIZERS):  # transformers would make an empty one up from the config
        return None
    return _loaded_tokenizer_hash(source, revision, trust_remote_code)


def _loaded_tokenizer_hash(source: str, revision: str | None, trust_remote_code: bool) -> str | None:
    """Return the hash of a tokenizer as transformers loads it, or None where it does not load."""
    try:
        tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)
    except ModelError:
        return None
    inner = getattr(tokenizer, "backend_tokenizer", None)
    return None if inner is None else tokenizer_hash(inner.to_str().encode())


def check_packages(student: Student) -> None:
    """Refuse a student that needs a package which is not installed.

    Raises:
        TrainingError: with what to install or to set.
    """
    if student.adapter.holds_4_bits and importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingError(
            "student.adapter is qlora, which needs the package bitsandbytes; install decant-kd[gpu], or set it to lora"
        )
    if student.attention == "flash_attention_2" and not any(
        importlib.util.find_spec(name) for name in ("flash_attn", "kernels")
    ):
        raise TrainingError(
            "student.attention is flash_attention_2, which needs the package flash-attn; install it, or set it to sdpa"
        )


def _quantization(student: Student) -> Any | None:
    """Return how weights are held in 4 bits, or None.

    Raises:
        TrainingError: there are no weights to hold.
    """
    if not student.adapter.holds_4_bits:
        return None
    if student.init == "random":
        raise TrainingError(
            "student.adapter is qlora over fresh weights (init: random); set it to none, since all of them must learn"
        )
    from transformers import BitsAndBytesConfig

    compute = torch.float32 if student.dtype == "float32" else DTYPES[student.dtype]
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def add_adapter(model: Any, adapter: Adapter, *, seed: int = 0) -> Any:
    """Wrap a model with low-rank additions to every linear layer but the head; `model` itself where the adapter is
    none.

    Raises:
        TrainingError: the adapter would touch head or embeddings, which the fused loss reads directly, or matches no
            layer.
    """
    if adapter.trains_all_weights:
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    modules = adapter.target_modules if isinstance(adapter.target_modules, str) else list(adapter.target_modules)
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=modules,
        exclude_modules=_linear_in_name(model) if modules == "all-linear" else None,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped = get_peft_model(model, config)
        _refuse_unmet_names(modules, wrapped.targeted_module_names)
    except (ValueError, re.error) as error:
        raise TrainingError(
            f"student.adapter.target_modules {json.dumps(modules)} cannot be adapted: "
            f"{reason_of(error, 200).rstrip('.')}; set it to all-linear or to names of the student's linear layers"
        ) from None
    _refuse_adapted_head(wrapped, model)
    return wrapped


def _refuse_unmet_names(names: str | list[str], adapted: Iterable[str]) -> None:
    """Refuse names that no adapted layer has; peft passes over them where another name is met.

    Raises:
        ValueError: with these names.
    """
    layers = [f".{layer}" for layer in adapted]
    unmet = [name for name in names if not any(layer.endswith(f".{name}") for layer in layers)]
    if unmet and not isinstance(names, str):
        raise ValueError(f"no layer is called {quoted(unmet)}")


def _linear_in_name(model: Any) -> list[str] | None:
    """Return the layers that a model derives from linear ones and that give something else, as some routers do."""
    plain = torch.nn.Linear
    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, plain)
        and type(layer).forward is not plain.forward
        and type(layer).__module__.startswith("transformers.models.")
    ]
    return names or None


def _refuse_adapted_head(wrapped: Any, model: Any) -> None:
    for role, layer in (("head", model.get_output_embeddings()), ("embeddings", model.get_input_embeddings())):
        adapted = any(name.startswith(("lora_", "modules_to_save")) for name, _ in layer.named_modules() if name)
        if adapted or hasattr(layer, "base_layer"):
            raise TrainingError(
                f"student.adapter.target_modules puts an adapter on the {role}, which the fused loss reads without it; "
                "leave it out (all-linear does), or train all weights with adapter: none"
            )
