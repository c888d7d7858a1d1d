"""Sweeps: run a recipe with many combinations of values, and compare the results."""
