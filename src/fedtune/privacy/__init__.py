"""Client-level differential privacy: what is added to a round, and what may be said of it."""
