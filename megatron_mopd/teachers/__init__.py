"""Frozen teachers: routing of samples, storage of weights, and cache of forward results."""
