"""Batched forward passes: answer probabilities, interventions, mean activations, the manipulation check."""
