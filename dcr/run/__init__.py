"""Runs: the store, what is trained, what is asked of it, experiments, grids, own data."""
