"""What is true of a model on disk or in memory, whichever phase asks: its files, its end tokens, how it is loaded.

The only room of `shared` that may import torch, transformers or peft, and only inside functions.
"""
