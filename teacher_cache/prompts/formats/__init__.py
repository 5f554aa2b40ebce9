"""What may a row of a prompt file look like, and which conversation is it?"""
