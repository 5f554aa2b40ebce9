"""What does a stage leave on disk while it runs, and which of several processes writes it?

Checkpoints, metrics, seconds, health, progress.
"""
