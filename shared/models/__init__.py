"""What is true of a model on disk or in memory, whichever phase asks: its files, its end tokens, whether it was loaded
whole.

The only room of `shared` that may import torch, transformers or peft, and only inside functions. Both phases and the
tools load models, adapters and tokenizers here, and nowhere else.
"""
