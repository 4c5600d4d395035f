"""`gptlab judge`: ideas for a trainer, one after the other, kept or discarded at an error rate that holds for all."""
