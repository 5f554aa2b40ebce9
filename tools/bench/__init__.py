"""Benchmarks: figures that docs/benchmarks.md quotes, each with a `run()` that returns them."""
