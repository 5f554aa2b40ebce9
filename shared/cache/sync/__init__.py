"""A cache in two places: its list of files, the local mirror of a URL, push and pull."""
