"""How close is a model to the teacher on rows that nothing trained on, as sums and intervals over rows?"""
