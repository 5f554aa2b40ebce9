"""How does a student learn from the teacher's hidden layers?

States and attention watched during the forward pass, projected where widths differ, compared by the losses.
"""
