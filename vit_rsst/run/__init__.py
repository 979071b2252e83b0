"""One run: its state, folder, resume points, signals and what it logs."""
