"""How good the images are: metrics, degradations, evaluation, ablation, particles."""
