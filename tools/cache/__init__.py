"""What can be done with a cache from the command line?

Looking, merging, exporting, importing, checking, cleaning up.
"""
