"""How does vLLM generate, and give exact sparse distributions with tails?"""
