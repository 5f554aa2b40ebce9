"""What does each model cost on this machine: memory, first token, tokens per second?"""
