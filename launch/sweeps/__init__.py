"""Grids of settings, each job a run of its own, and their figures."""
