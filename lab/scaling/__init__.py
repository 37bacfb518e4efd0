"""Simulates the scaling of a fleet."""
