"""What is left after a kill, a flipped bit or a mangled file? Kills, flips and fuzz, and what is there compared."""
