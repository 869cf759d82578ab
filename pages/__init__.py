"""The HTML pages and their contents: recordings of a forward pass, predictions, and templates."""
