"""From a recipe to the parts of a run. Recipe objects stop here; what lies below takes plain arguments."""
