"""How does a cache become one in another tokenizer?

student_rows.py writes the rows anew, alignment.py finds where both tokenizers cut the text at the same byte,
vocabulary_map.py says on which student token a teacher's text begins, projection.py carries the distributions over,
translate_cache.py does it for a cache.
"""
