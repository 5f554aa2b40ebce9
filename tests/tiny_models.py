"""Tiny tokenizers and random models that every test can afford: seeded, a few thousand parameters, loadable by vLLM.

The tokenizer is a byte-level BPE of 512 entries with ChatML special tokens and template. The models have random weights
wide enough that distributions are peaked, head_dim 32 (the least that vLLM takes), and are saved as float32
safetensors. Same arguments give the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB_SIZE = 512
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def training_text() -> list[str]:
    """Return sentences to learn merges from: arithmetic, code and operations, as in the demo."""
    things = ("apples", "servers", "disks", "lines of code", "packets", "tickets", "alarms", "pods")
    people = ("Anna", "Ben", "Chidi", "Dora", "Emil", "Farah")
    text = [
        f"{person} has {number} {thing} and gives {number // 2} of them away. How many {thing} are left? The answer "
        f"is {number}."
        for person in people
        for number, thing in enumerate(things, start=7)
    ]
    text += [f"def add_{thing.split()[0]}(first, second):\n    return first + second\n" for thing in things]
    text += [
        f"Warning: {thing} on node {number} are above the threshold, please restart the service."
        for number, thing in enumerate(things)
    ]
    text += [
        "system user assistant\nYou are a helpful assistant. Say hello to the quick brown fox that jumps over the "
        "lazy dog."
    ]
    text += [
        "A teacher writes its distribution once, and any number of students read it afterwards without a teacher in "
        "memory.",
        "When the machine stops in the middle of a sentence, nothing that was committed is lost, and the same "
        "command continues.",
        "Sort the numbers first; then return the largest of them, the smallest of them, and the difference between "
        "both.",
        "The train leaves at seven in the morning and arrives two hours later, so how fast does it travel over "
        "ninety miles?",
        "Disk pressure on the database server was high because old logs were never deleted; rotate them every night.",
    ]
    return text


def make_tokenizer(directory: Path, chat_template: str | None = CHATML) -> Any:
    """Train, save and return a byte-level BPE tokenizer of exactly 512 entries; end token `<|im_end|>`, no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from shared.models.large_imports import import_transformers

    import_transformers()
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(training_text(), trainer)
    assert inner.get_vocab_size() == VOCAB_SIZE
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    return tokenizer


def make_qwen3(directory: Path, **settings: Any) -> Path:
    """Save a random Qwen3 with its tokenizer and return the directory; see `_make` for what may be set."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _make(directory, Qwen3Config, Qwen3ForCausalLM, tied=True, **settings)


def make_llama(directory: Path, **settings: Any) -> Path:
    """Save a random Llama with its tokenizer and return the directory; see `_make` for what may be set."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _make(directory, LlamaConfig, LlamaForCausalLM, tied=False, **settings)


def make_qwen2(directory: Path, **settings: Any) -> Path:
    """Save a random Qwen2, for whose type transformers puts a pre-tokeniser of its own over this tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _make(directory, Qwen2Config, Qwen2ForCausalLM, tied=True, **settings)


def _make(
    directory: Path,
    config_class: Any,
    model_class: Any,
    *,
    tied: bool,
    vocab_size: int = VOCAB_SIZE,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 2,
    num_kv_heads: int = 1,
    max_position_embeddings: int = 512,
    seed: int = 0,
    spread: float = 0.3,
    end_scale: float = 2.0,
    tie_word_embeddings: bool | None = None,
    chat_template: str | None = CHATML,
) -> Path:
    """Build one model.

    `spread` is the standard deviation of the weights (0.3 gives an entropy of 3-4 nats), `end_scale` stretches the end
    token's row of the head so that some answers end by themselves, `vocab_size` may exceed 512 for padded heads.
    """
    import torch
    from transformers import GenerationConfig

    tokenizer = make_tokenizer(directory, chat_template)
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=32,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tied if tie_word_embeddings is None else tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=spread,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= end_scale
        model.get_output_embeddings().weight[len(tokenizer) :] = 0.0
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(directory, safe_serialization=True)
    return directory


def spoil(directory: Path, token_id: int) -> None:
    """Make the embedding of one token NaN in a saved model."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][token_id] = torch.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def overflow(directory: Path) -> None:
    """Make the head of a saved model with one of its own so large that its logits are infinite in float16."""
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] *= 6e4 / weights["lm_head.weight"].abs().max()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
