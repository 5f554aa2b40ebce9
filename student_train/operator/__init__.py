"""How is the loss computed without ever holding [positions, vocabulary]?

Head and divergences in chunks of positions, in torch and in Triton, with their gradients.
"""
