"""Engines: two ways to run a model along the paths of integrated gradients, with equal scores."""
