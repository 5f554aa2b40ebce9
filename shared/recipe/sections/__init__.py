"""The sections of a recipe, a file each: teacher, prompts, capture, stages, evaluation and what they hold."""
