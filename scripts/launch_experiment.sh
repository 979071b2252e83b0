#!/usr/bin/env bash
# Starts an experiment from the positionals and option names of the original RSST program (vit_rsst/cli/launcher.py).
#   scripts/launch_experiment.sh cifar10 vit_tiny 80 1.0 4 false 0.2 y rsst
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python3
python=${PYTHON:-$python}
"$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "timm", "accelerate", "pydantic"))))' || {
    echo "error: $python does not have vit_rsst's dependencies; run scripts/quickstart, or set PYTHON. Nothing was started." >&2
    exit 3
}
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m vit_rsst.cli.launcher "$@"
