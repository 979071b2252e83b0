"""Data: the catalogue of sources, reading and splitting them, and loaders that deal global batches to ranks."""
