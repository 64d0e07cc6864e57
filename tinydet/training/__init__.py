"""Training: the loop and the small parts around it."""
