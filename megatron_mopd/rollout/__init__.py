"""Rollout: the student samples its own trajectories."""
