"""Results as objects: the result of a run, neuron cards, and the comparison of several runs."""
