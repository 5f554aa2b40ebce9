"""Which models are compared, what are they asked with, and how do they answer?"""
