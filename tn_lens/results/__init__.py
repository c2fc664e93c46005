"""What a run found, as objects: the result of a run, neuron cards, and several runs side by side."""
