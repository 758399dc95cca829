"""Training: recipes over transformers' Trainer, and the gradient-norm callback."""
