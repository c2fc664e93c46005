"""Evaluation: the effect of ablating the found neurons, beside every control (paper 3.3, 3.4)."""
