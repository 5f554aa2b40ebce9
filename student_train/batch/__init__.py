"""How do rows of a cache become tensors?

Packs of rows with their labels, sparse targets, hidden states, and what of these a stage's losses read.
"""
