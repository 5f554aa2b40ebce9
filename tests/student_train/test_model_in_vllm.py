"""A stage's model is one that vLLM serves: same greedy tokens as transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.recipe.file import dump_recipe
from student_train.stage.stages import run_stages
from tools.export.export_run import export_run

pytest.importorskip("vllm")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "adapter"), [("qwen3", "none"), ("llama", "lora")])
def test_final_model_answers_in_vllm_as_in_transformers(recipe_of, tiny, monkeypatch, family, adapter):
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    student = {"model": str(getattr(tiny, family)), "adapter": adapter}
    recipe = recipe_of(student=student, trainer={"max_steps": 20, "learning_rate": 1e-2})
    (model_dir,) = run_stages(recipe)
    if adapter != "none":  # the same engine start serves for what `decant export` writes
        (recipe.output_dir / "recipe.yaml").write_text(dump_recipe(recipe))
        model_dir = Path(export_run(recipe.output_dir, None, None, keep_adapter=True)[0]["model"])
    engine = LLM(str(model_dir), dtype="float32", max_model_len=128, enforce_eager=True)
    conversation = [{"role": "user", "content": "math: what follows one and 8?"}]
    served = engine.chat(conversation, SamplingParams(temperature=0, max_tokens=12))[0]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    prompt = torch.tensor([served.prompt_token_ids])
    expected = model.generate(prompt, do_sample=False, max_new_tokens=12)[0, prompt.shape[1] :].tolist()
    assert list(served.outputs[0].token_ids) == expected
    assert engine.get_tokenizer().eos_token_id == model.generation_config.eos_token_id
