"""How do caches that others made become one of ours, and ours one of theirs?

One file per format that is read and one per format that is written. Readers yield `ForeignRow`s (token ids, and for
some tokens the entries that a teacher named); `heads` makes targets of them and `import_cache` commits them. What a
format does not say is marked in the layer (`tail`, `labels`) and never made up.
"""
