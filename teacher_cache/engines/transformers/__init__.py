"""How does transformers answer, score and show hidden states? The reference engine."""
