"""One run from its options to its summary: the loop, its baselines, and who is told how it goes."""
