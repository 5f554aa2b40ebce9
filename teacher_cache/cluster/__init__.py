"""How do many engines share one plan? Ray actors, the board of units, their progress."""
