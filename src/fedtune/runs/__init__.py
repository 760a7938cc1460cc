"""One run from its options to its summary: the loop, its baselines, and who follows it."""
