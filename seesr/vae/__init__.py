"""The VAE at any image size: in one pass, layer by layer in row strips, or in lockstep tiles."""
