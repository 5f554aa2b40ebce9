"""What both phases agree on: recipe, cache format, codec, identity, reader and writer. Never imports torch, vllm or
transformers.
"""
