"""Foundations of all other packages: errors, options, settings, registries, seeds and stored results."""
