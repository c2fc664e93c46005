"""The embedded model's weights, and a model with planted truth neurons."""
