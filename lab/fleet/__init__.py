"""Load and fault experiments with a fleet."""
