"""The table of optimizers against transformers' own names and against the state that torch's really keep."""

from __future__ import annotations

import pytest

from shared.recipe.recipe import StageTrainer
from shared.recipe.sections.optimizers import ADAM, OPTIMIZERS


def test_every_name_is_one_of_transformers() -> None:
    from transformers.training_args import OptimizerNames

    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"])
def test_state_of_an_optimizer_is_counted_as_torch_keeps_it(name: str) -> None:
    import torch

    kind = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}
    weight = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = kind.get(name, torch.optim.AdamW)([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if getattr(t, "numel", int)() > 1]
    assert OPTIMIZERS[name].state_bytes(4) == sum(t.numel() * t.element_size() for t in kept) / weight.numel()


def test_four_bits_take_half_of_eight_and_paged_ones_say_so() -> None:
    four, eight = OPTIMIZERS["adamw_torch_4bit"], OPTIMIZERS["adamw_torch_8bit"]
    assert 0.5 < four.state_bytes(4) / eight.state_bytes(4) < 0.6
    assert four.state_bytes(2) == four.state_bytes(4)
    assert {name for name, one in OPTIMIZERS.items() if one.is_paged} == {
        n for n in OPTIMIZERS if n.startswith("paged")
    }


@pytest.mark.parametrize("name", ["adamw", "galore_adamw", "", "AdamW_torch"])
def test_an_optimizer_that_no_stage_can_use_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no optimizer that a stage can use"):
        StageTrainer(optim=name)


def _options(name: str, **changed: float) -> str:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir="unused", optim=name, report_to="none", use_cpu=True, **changed)
    return repr(Trainer.get_optimizer_cls_and_kwargs(arguments)[1])


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_optimizer_reads_what_transformers_hands_on_to_it(name: str) -> None:
    try:
        usual = _options(name)
    except (ImportError, RuntimeError, ValueError) as error:
        pytest.skip(f"not installed: {error}")
    assert {setting for setting in ADAM if _options(name, **{setting: 0.25}) != usual} == set(OPTIMIZERS[name].reads)
    for setting in set(ADAM) - set(OPTIMIZERS[name].reads):
        with pytest.raises(ValueError, match=f"the optimizer '{name}' does not use it"):
            StageTrainer.model_validate({"optim": name, setting: 0.25})
