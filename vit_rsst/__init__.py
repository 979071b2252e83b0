"""Train and prune Vision Transformers: a Hugging Face Accelerate trainer for sparse ViTs.

Importing the package is free: neither torch nor datasets is loaded until a part that needs them is.
"""

__version__ = "0.2.0"
