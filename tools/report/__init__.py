"""The report of a run: figures first, then plots, then answers side by side, in one file that needs no network."""
