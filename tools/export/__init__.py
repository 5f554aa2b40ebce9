"""How does a trained stage become a plain model directory with a card that tells the truth?"""
