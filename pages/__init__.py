"""What the HTML pages show: recordings of a forward pass, predictions, and the templates."""
