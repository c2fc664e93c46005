"""The weights of the embedded toy model, and a model with planted truth neurons."""
