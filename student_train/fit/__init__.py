"""Does it fit the card and the disk?

Memory by counting, the first step by measuring, checkpoints by adding up.
"""
