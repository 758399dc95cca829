"""What a run will take, before it runs: trainable parameters, peak memory, matrix-product FLOPs, and what to lower."""
