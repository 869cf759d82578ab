"""Comparing another GPT-2 with gpt2.py: recordings, names, layouts, precision, mistakes, causes."""
