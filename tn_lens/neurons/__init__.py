"""Sites, neurons, sets of neurons, and the space of all neurons of a model."""

from tn_lens.neurons.neuron import Neuron, NeuronSet
from tn_lens.neurons.sites import NEURON_SITES, SITES, Site, SiteName, hook_name
from tn_lens.neurons.space import NeuronSpace, usual_sites

__all__ = [
    "NEURON_SITES",
    "SITES",
    "Neuron",
    "NeuronSet",
    "NeuronSpace",
    "Site",
    "SiteName",
    "hook_name",
    "usual_sites",
]
