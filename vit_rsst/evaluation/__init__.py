"""Scores: evaluating a model on a split, predicting images, the reported metrics."""
