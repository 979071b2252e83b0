"""The checklist before a long run: what would go wrong, found in minutes."""
