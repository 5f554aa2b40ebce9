"""Which files does a source name, and how are they read, one row at a time?"""
