"""How do bytes come from a URL to this machine, and back?

`transfer` repeats what breaks off, `part_store` keeps fetched parts within a bound; neither knows what a cache is.
"""
