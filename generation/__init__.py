"""Writing text: rows, passes, guesses, stop strings, the prefix cache, the terminal."""
