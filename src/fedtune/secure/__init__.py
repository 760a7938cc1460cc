"""Secure sums: the server adds up masked messages, and learns their sum alone. A simulation of the protocol in one process."""
