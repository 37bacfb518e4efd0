"""What a bundle loads and how it runs: models, SeeSR's attention, the tagger, hardware, CUDA graphs."""
