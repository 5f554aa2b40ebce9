"""How do parts, layers and jobs make a cache?

Layout, writers, readers, statistics, verification, garbage.
"""
