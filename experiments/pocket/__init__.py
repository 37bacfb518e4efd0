"""Training of the pocket bundle."""
