"""What is kept of an evaluation, in which shape, and when may it be used again?"""
