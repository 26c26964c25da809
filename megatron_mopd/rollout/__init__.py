"""How the student writes its own trajectories."""
