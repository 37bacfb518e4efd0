"""The networks of SeeSR and their execution: UNet, ControlNet, tagger, text encoder, kernels, CUDA graphs."""
