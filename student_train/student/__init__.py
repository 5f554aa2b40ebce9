"""Which model learns, and how does its forward pass give a loss?

Loading, adapters, head and body, rows of a pack kept apart, the patched forward.
"""
