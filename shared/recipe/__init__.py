"""What may a recipe say? `recipe` is the whole, `sections` its parts, `file` and `override` where it comes from."""
