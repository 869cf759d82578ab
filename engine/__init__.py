"""What makes NumPy fast: products of a few rows, and the threads and processes that share work."""
