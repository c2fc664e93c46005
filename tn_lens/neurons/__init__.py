"""Sites, neurons, sets of neurons, and the space of all neurons of a model."""

from tn_lens.neurons.neuron import (
    HOOKS,
    SITES,
    Neuron,
    NeuronSet,
    NeuronSpace,
    Site,
    hook_name,
    layer_in_words,
)

__all__ = ["HOOKS", "SITES", "Neuron", "NeuronSet", "NeuronSpace", "Site", "hook_name", "layer_in_words"]
