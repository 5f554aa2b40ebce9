"""How far is the student from the teacher while it trains?

Held-out figures, sample answers, and what follows from them: the best step, and whether to stop.
"""
