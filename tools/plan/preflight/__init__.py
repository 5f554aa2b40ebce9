"""What is known to be wrong with a recipe before any work? One file a section, one table of all."""
