"""What `scripts/study` and `scripts/search` are made of: reading their plans, running many trainers, comparing runs."""

import sys

try:
    import vit_rsst.train  # noqa: F401
except ImportError as error:
    told = f"error: {sys.executable} cannot run this ({error}): make .venv with scripts/quickstart and activate it."
    print(told, file=sys.stderr)
    sys.exit(3)
