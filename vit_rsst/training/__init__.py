"""What a step learns with: losses, optimizer, schedules, averages."""
