"""Image quality: metrics, degradations, evaluation, ablation, steering."""
