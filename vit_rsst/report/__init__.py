"""What a person sees of a run: figures, the report, comparisons and a diagnosis in words."""
