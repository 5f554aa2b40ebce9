"""Is this the same teacher, tokenizer, capture?

What is compared and hashed, what is only recorded, and how identities grow.
"""
