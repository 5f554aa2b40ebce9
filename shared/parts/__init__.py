"""How does one file of a cache come to be, and how is it read?

Arrow files, the records that commit them, the plans that name them; every name, size and checksum is looked at before a
value is used.
"""
