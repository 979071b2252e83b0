"""Training components: losses, optimizers, schedules, weight averaging."""
