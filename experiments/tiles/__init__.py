"""Studies of tiling: difference from one pass, and cost."""
