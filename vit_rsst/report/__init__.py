"""What a person sees of a run: figures, a report, comparisons, a diagnosis in words."""
