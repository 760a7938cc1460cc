"""Differential privacy of clients, or of the examples of each: what is added to a round, and what may be said of it."""
