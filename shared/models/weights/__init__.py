"""Are all of a model's weights there, for the class that its config names, and do an adapter's fit? Then load them."""
