"""Models: the catalogue of names, construction through timm, and which weights can be pruned."""
