"""Demo data and demo models: three small synthetic domains, a tokenizer, a teacher and a student, all made by committed
scripts.
"""
