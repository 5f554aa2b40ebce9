"""How do running vLLM servers answer and score?"""
