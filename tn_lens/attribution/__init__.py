"""Attribution: integrated gradients for every neuron of every layer, and other methods."""
