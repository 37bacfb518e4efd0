"""Speed: benchmarks, operation counts and profiles."""
