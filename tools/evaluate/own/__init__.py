"""How close is a model to the teacher on what it says itself? Its own answers to held-out prompts, scored."""
