"""`python -m vit_rsst.cli` is `vit-rsst`."""

import sys

from vit_rsst.cli import main

sys.exit(main())
