"""The same numbers as the SeeSR reference recorded."""
