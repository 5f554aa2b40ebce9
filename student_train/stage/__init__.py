"""How does one stage get from the recipe to an exported model?

What it starts from, what it reads, whether it is done already, and the order of everything else in this package.
"""
