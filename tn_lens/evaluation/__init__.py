"""Evaluation: the effect of ablating the found neurons, compared with controls (paper 3.3, 3.4)."""
