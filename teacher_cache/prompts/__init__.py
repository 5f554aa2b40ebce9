"""How do files of prompts become rows of token ids with spans to score?

Files and formats, chat templates, the work list.
"""
