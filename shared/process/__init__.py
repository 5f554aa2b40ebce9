"""What is this process on its machine: what it may use, whose end is its own, where a test kills it."""
