"""What a run found, as objects: the result of a run, neuron cards, and several runs side by side."""

from tn_lens.results.card import Activation, Card, Example, Token, load_cards
from tn_lens.results.make_cards import N_CARDS, make_cards, neuron_card

__all__ = ["N_CARDS", "Activation", "Card", "Example", "Token", "load_cards", "make_cards", "neuron_card"]
