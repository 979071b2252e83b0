"""The library for training scripts and trained models: what `import vit_rsst` offers, listed in `vit_rsst.__all__`."""
