"""What a cache is read through: columns, hidden states, the rows that are shown, sums, the check of every part."""
