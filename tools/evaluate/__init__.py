"""How good is every model, side by side? One process a model; task scores, held-out divergence, answers, cost."""
