"""What does an engine hand over per position? Columns of ids and log-probabilities, with sentinels for tails and
draws.
"""
