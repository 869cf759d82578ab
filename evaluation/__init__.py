"""What a model is asked: items of HellaSwag, LAMBADA and your own, in ids, and their marks."""
