"""The demo tokenizer: byte-level BPE of about 1,300 entries with digits and line feeds apart, and a ChatML template.

Digits are single tokens, so that arithmetic is learnable; a bench asks for tokens that join them. Line feeds are split
off before the spaces that follow them: otherwise the line feed that ends the template's header would merge with an
answer's indentation, and the prompt's tokens would be no prefix of the whole.
Cost: a few seconds, on 4,000 examples per domain.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from tools.demo.domains import DOMAINS, stream

VOCABULARY_SIZE = 1280
TOKENIZER_SEED = 1
NUM_EXAMPLES = 4000
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(digits: int = 1) -> Any:
    """Train the tokenizer on its own stream of examples; returns a transformers fast tokenizer.

    Args:
        digits: that one token may join at most; with 3 "12345" is cut as 123, 45 before merges apply.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("\n"), behavior="isolated"),
        pre_tokenizers.Digits(individual_digits=True)
        if digits == 1
        else pre_tokenizers.Split(Regex(rf"\d{{1,{digits}}}"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        text
        for domain in DOMAINS
        for item in islice(stream(domain, TOKENIZER_SEED), NUM_EXAMPLES)
        for text in (item.prompt, item.answer)
    ]
    backend.train_from_iterator(
        [*texts, "system\n", "user\n", "assistant\n"] + ["user", "assistant", "system"] * 1000, trainer
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD, model_max_length=512)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat_prompt(prompt: str) -> str:
    """The text before an answer, as the chat template writes it."""
    return f"{START}user\n{prompt}{END}\n{START}assistant\n"
