"""Texts, their tokens, and how they are divided among clients: from a task's name to batches."""
