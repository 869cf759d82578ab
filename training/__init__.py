"""What carries a training run: recipes, batches, state, devices, checkpoints, and what it shows."""
