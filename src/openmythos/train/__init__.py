"""Training: loss, optimisers, parallelism, checkpoints, metrics and the trainer."""
