"""The recipe: its schema, how it is read and which of its fields fit together."""
