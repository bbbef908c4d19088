"""Training engine: the three-network distillation loop, samplers, checkpoints and metrics."""
