"""What does a file unpack to, by its own headers?

They are read before Arrow or Parquet touches a byte, so that nothing is allocated by what a stranger claims.
"""
