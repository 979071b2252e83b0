"""Outputs of a run: tickets, round results, slim folders, and loading them back into a network."""
