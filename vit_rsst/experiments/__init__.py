"""Many runs: `vit-rsst study` and `vit-rsst search`."""
