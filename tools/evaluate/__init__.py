"""Every model side by side: task scores in a sandbox, held-out divergence from the cache."""
