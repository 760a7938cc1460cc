"""Federated algorithms, a file each, that read as their papers do."""
