"""Text as it is written: rows, passes, guesses, stop strings, the prefix cache, the terminal."""
