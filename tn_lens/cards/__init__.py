"""Neuron cards: everything that a run knows of one neuron, and what is easiest to look up beside it."""

from .card import Activation, Card, Example, Token, load_cards
from .make import N_CARDS, make_cards, neuron_card

__all__ = ["N_CARDS", "Activation", "Card", "Example", "Token", "load_cards", "make_cards", "neuron_card"]
