"""What any program needs, with or without a model: command lines, and safe files."""
