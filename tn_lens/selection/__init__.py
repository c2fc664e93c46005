"""From scores to neurons: thresholds, the held-out test, stability, and the stored scores of a run."""
