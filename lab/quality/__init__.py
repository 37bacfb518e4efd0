"""How good the pictures are: metrics, degradations, evaluation, ablation, particles."""
