"""What a run leaves: tickets, rows of rounds, slim folders, and the way back to a network."""
