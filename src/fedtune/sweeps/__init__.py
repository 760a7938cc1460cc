"""Grids of runs: what a sweep file says, and who does the runs."""
