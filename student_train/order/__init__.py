"""Which rows, in which packs, in which order?

A pure function of settings and seed, so that a killed run goes on with the pack that it would have had.
"""
