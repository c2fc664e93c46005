"""What every other package stands on: errors, settings, registries, seeds and stored results."""
