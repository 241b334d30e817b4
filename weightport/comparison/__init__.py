"""Compares schedulers: speed, model calls and distance to a converged reference."""
