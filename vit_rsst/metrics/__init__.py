"""Metrics: additive counters for the loop, `evaluate.Metric` classes for what is reported. No network."""
