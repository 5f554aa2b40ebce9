"""How does a conversation become token ids and the spans that are scored?"""
