"""What any program needs, and no model: command lines, and files that are whole or absent."""
