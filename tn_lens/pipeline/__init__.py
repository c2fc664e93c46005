"""The whole method in one call, dry runs, and the evaluation of found neurons on other question sets."""
