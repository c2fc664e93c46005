"""Sites, neurons, sets of neurons, and the space of all neurons of a model."""

from tn_lens.core.options import NEURON_SITES as NEURON_SITES
from tn_lens.neurons.neuron import Neuron as Neuron
from tn_lens.neurons.neuron import NeuronSet as NeuronSet
from tn_lens.neurons.sites import SITES as SITES
from tn_lens.neurons.sites import Site as Site
from tn_lens.neurons.sites import SiteName as SiteName
from tn_lens.neurons.sites import hook_name as hook_name
from tn_lens.neurons.space import NeuronSpace as NeuronSpace
from tn_lens.neurons.space import usual_sites as usual_sites
