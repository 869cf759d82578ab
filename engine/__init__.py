"""What makes NumPy fast: products of a few rows, and the threads that share them."""
