"""What the page shows besides tables: plots, courses over steps, answers side by side, places where models part."""
