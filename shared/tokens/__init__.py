"""Which bytes does a token stand for?

Tokenizers meet in bytes alone: ids and pieces of one mean nothing to another.
"""
