"""Phase 1: prompts -> engine -> capture -> cache."""
