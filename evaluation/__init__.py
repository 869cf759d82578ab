"""Multiple-choice tasks: HellaSwag, LAMBADA and your own, encoded, and scored."""
