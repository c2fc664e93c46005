"""Engines: two ways to run a model along the paths of integrated gradients, which give equal scores."""
