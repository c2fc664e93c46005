"""The engines that run a model along the paths of integrated gradients."""
