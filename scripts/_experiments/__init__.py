"""What `scripts/study` and `scripts/search` are made of: reading their plans, running many trainers, comparing runs."""
