"""A model's files: downloading them, tensors in safetensors, and TensorFlow checkpoints."""
