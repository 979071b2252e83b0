"""Checks to run before a long training: finds in minutes what would go wrong."""
