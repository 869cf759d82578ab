"""A model's files: downloads, tensors in safetensors, tokenizers, and TensorFlow checkpoints."""
