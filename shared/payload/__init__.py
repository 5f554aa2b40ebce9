"""What are one row's targets, as arrays and as bytes?

Sparse distributions and hidden states, quantised, in planes, one checked frame per row; cut to less exactly.
"""
