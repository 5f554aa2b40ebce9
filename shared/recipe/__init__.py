"""What may a recipe say? One file per section, the file with its places, and overrides."""
