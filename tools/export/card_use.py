"""How an exported student is talked to, for its card: template, end tokens, and an example that runs as it stands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from shared.cache.chat_settings import ChatSettings
from shared.recipe.recipe import Generate, PromptSource
from tools.cache.dataset_card import plain


@dataclass(frozen=True, slots=True)
class ChatUsage:
    """What a card says about asking the model."""

    settings: ChatSettings | None
    """How the rows of its caches were rendered; None where no cache could be read."""
    end_ids: Sequence[int]
    """End tokens that the model's files name."""
    note: str | None
    """What people should know about both."""


def use_lines(usage: ChatUsage, generate: Generate | None) -> list[str]:
    """Return the card's lines on use; `generate` drew the answers that it learnt from, None: they were given."""
    sources = usage.settings.sources if usage.settings else ()
    chat = [source for source in sources if source.of_turns and source.template == "chat"]
    ends = ", ".join(map(str, usage.settings.end_ids if usage.settings else usage.end_ids)) or "none"
    lines = [f"- {plain(line)}" for line in _said(sources, chat)]
    lines.append(f"- end tokens that it was trained to write: {ends} (in generation_config.json)")
    if generate is not None:
        drawn = f"temperature {generate.temperature:g}, top_p {generate.top_p:g}, top_k {generate.top_k}"
        lines.append(f"- the answers that it learnt from were drawn at {drawn}, up to {generate.max_new_tokens} tokens")
    if usage.note:
        lines.append(f"- {plain(usage.note)}")
    return [*lines, "", "```python", *_example(chat if chat or sources else [None]), "```", "", "    vllm serve .", ""]


def _said(sources: Sequence[PromptSource], chat: Sequence[PromptSource]) -> list[str]:
    """Return how prompts were made, source by source, where the settings are not the template's own."""
    found = []
    for source in chat:
        settings = source.model_dump(
            mode="json", exclude_defaults=True, include={"system", "chat_template_kwargs", "date"}
        )
        told = ", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items())
        found += [f"source {source.source}: asked with its chat template and {told}"] if told else []
    if chat:
        found.insert(0, "trained on chats: ask it through its chat template")
    names = [source.source for source in sources if source not in chat]
    return found + ([f"plain text without a template: {', '.join(names)}"] if names else [])


def _example(chat: Sequence[PromptSource | None]) -> list[str]:
    """Return a program that asks one question as the first source did; plain text where there was no chat."""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
    ]
    if not chat:
        lines.append('inputs = tokenizer("Once upon a time", return_tensors="pt")')
    else:
        first = chat[0]
        system = [{"role": "system", "content": first.system}] if first is not None and first.system else []
        turns = [*system, {"role": "user", "content": "Hello!"}]
        kwargs = first.chat_template_kwargs if first is not None else {}
        more = "".join(f", {name}={value!r}" for name, value in kwargs.items() if name.isidentifier())
        lines += [
            f"turns = {turns!r}",
            "inputs = tokenizer.apply_chat_template(",
            f'    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True{more}',
            ")",
        ]
    return [
        *lines,
        "answer = model.generate(**inputs, max_new_tokens=256)[0, inputs['input_ids'].shape[1] :]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
