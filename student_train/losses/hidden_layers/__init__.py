"""What is minimised inside? Losses on a hidden layer of the cache: states, attention, pooled states of rows.

One loss per file, as above; they see nothing of the head, and the losses of the head nothing of them.
"""
