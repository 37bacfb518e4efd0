"""Comparison with the recorded numbers of the SeeSR reference."""
