"""Makes NumPy fast: products of a few rows, and threads and processes that share the work."""
