"""An adapter's config that claims more than its tensors hold is refused before peft makes what it claims."""

from __future__ import annotations

import json
import resource
import shutil
import warnings
from pathlib import Path

import pytest

from shared.errors import ModelError
from shared.models.weights.loading import load_causal_lm
from tests.tiny_models import make_qwen3


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    from peft import LoraConfig, get_peft_model

    place = tmp_path_factory.mktemp("models")
    make_qwen3(place / "student", seed=0, num_layers=1)
    for name, rank in (("small", 4), ("wide", 512)):
        model = load_causal_lm(place / "student", what="the student", trust_remote_code=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"])).save_pretrained(place / name)
    return place


def altered(models: Path, tmp_path: Path, change: dict) -> Path:
    adapter = Path(shutil.copytree(models / "small", tmp_path / "adapter"))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return adapter


@pytest.mark.parametrize("change, said", [
    ({"r": 30_000_000}, "a rank of 30000000 that none of its tensors has"),
    ({"r": 10**18}, "a rank of 1000000000000000000 that"),
    ({"rank_pattern": {"q_proj": 30_000_000}}, "a rank of 30000000 that"),
    ({"layer_replication": [[0, 1]] * 100_000}, "100000 layers, and a model has at most"),
    ({"layer_replication": [[0, 10**9]]}, "1000000000 layers, and"),
])  # fmt: skip
def test_claims_are_refused_before_anything_is_made(models, tmp_path, change, said):
    adapter = altered(models, tmp_path, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=rf"^the adapter '.*' says {said}"):
        load_causal_lm(models / "student", what="the student", trust_remote_code=False, adapter=adapter)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


@pytest.mark.parametrize("name", ["small", "wide"])
def test_a_rank_that_its_tensors_have_passes(models, name):
    plain, adapted = (
        load_causal_lm(models / "student", what="the student", trust_remote_code=False, adapter=adapter).state_dict()
        for adapter in (None, models / name)
    )
    assert all(weight.equal(adapted[at]) for at, weight in plain.items())  # a new adapter adds nothing yet
