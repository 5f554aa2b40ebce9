"""How are the steps of a stage made?

The Trainer, what several processes hold, the weights that move over the steps, and what stops a run that diverges.
"""
