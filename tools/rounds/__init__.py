"""How does a stage train on its student's own answers? What a round is made of, and the order of its three steps.

Each step is a derived recipe for what exists already: answering and scoring are builds of a cache of the run, training
is a stage that starts from the round before and mixes that cache with the recipe's.
"""
