"""The autoencoder: pixels to latents and back, in one pass, layer by layer in row strips, or in lockstep tiles."""
