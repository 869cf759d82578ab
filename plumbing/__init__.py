"""Helpers for any program, with or without a model: command lines, and safe files."""
