"""The parts of a training run: recipes, batches, state, devices, checkpoints, progress."""
