"""Peak memory of training beside the prediction of `--dry-run`, for five recipes on the CPU.

dense, rsst, a moving average, distillation from the run's own dense model, and straight-through pruning, each in its
own process. Measured is by how much the resident memory of the process grows from the start of the run to its peak:
after a rehearsal with few images, which imports libraries and starts threads, the kernel's record of the peak is reset.
glibc is told to map every block above 64 KiB and to return it when it is freed (MALLOC_MMAP_THRESHOLD_,
MALLOC_TRIM_THRESHOLD_), so that memory that torch has freed does not count. Predicted is what torch allocates: on the
device and, since that is the host here, on the host, and the decoded images. The copy of a resume point does not count:
here it is written before the next step.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _common import environment, parse_args, report
from accelerate.state import AcceleratorState, GradientState, PartialState
from selection import resident

from vit_rsst.assembly.data import count_rows
from vit_rsst.assembly.needs import needs
from vit_rsst.assembly.parts import Sizes, prepare
from vit_rsst.recipe.loading import load
from vit_rsst.recipe.schema import Recipe
from vit_rsst.text import size
from vit_rsst.train import main as train

BOUND = 0.1
"""Maximum distance of the measured peak from the predicted one, as a share of the latter."""

CASES = {
    "dense": ["pruning.method=dense"],
    "rsst": ["pruning.method={name: rsst, remove_at: 1.0}"],
    "ema": ["pruning.method=dense", "train.ema_decay=0.99"],
    "distill": ["pruning.method=imp", "train.distill.teacher=dense"],
    "ste": ["pruning.method={name: ste, interval: 1}"],
}
RECIPE = """\
name: measured
data: {{source: digits}}
model: {{name: vit_tiny, args: {{embed_dim: 384, depth: {depth}, num_heads: 6}}}}
train: {{epochs: 1, round_epochs: 1, global_batch: {batch}, steps_per_epoch: 2}}
pruning: {{schedule: {{rounds: 1, final_sparsity: 0.5}}}}
tracking: {{figures: false}}
output_dir: {folder}
"""
BATCH, DEPTH, QUICK_DEPTH, REHEARSED = 128, 6, 1, 8
WRITTEN = "resume point while it is written"
ROLE = "MEMORY_OF"
"""Environment variable that makes this script train once and print the growth at its peak: the case."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def write_recipe(folder: Path, depth: int) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder / "runs", batch=BATCH, depth=depth), encoding="utf-8")
    return path


def predicted(recipe: Recipe) -> dict[str, int]:
    """Bytes by use, as `--dry-run` prints them."""
    rows = count_rows(recipe)
    sizes = Sizes.of(recipe, rows, 1)
    parts = prepare(recipe, sizes, torch.device("meta"))
    found = needs(parts, parts.preview(sizes.progress), sizes.dealing, (rows.val, rows.test), on_gpu=False)
    images = (rows.train + rows.val + rows.test) * 3 * sizes.image_size**2
    uses = found.device | found.host | {"images": images}
    return {use: n for use, n in uses.items() if n and use != WRITTEN}


def train_once(case: str, path: Path) -> None:
    """Prints the growth of resident memory at the peak of the run, in bytes."""
    few = [f"train.global_batch={REHEARSED}", "name=rehearsal"]
    run_of(path, *CASES[case], *few)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = resident("VmRSS")
    run_of(path, *CASES[case])
    print(json.dumps(resident("VmHWM") - before))


def run_of(path: Path, *options: str) -> None:
    if code := train([str(path), *options]):
        raise RuntimeError(f"training exited with {code}")
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def measured(case: str, path: Path) -> int:
    """Of a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    variables = os.environ | ALLOCATOR | {ROLE: case, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(path)], env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{case} exited with {done.returncode}: {done.stderr[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    if case := os.environ.get(ROLE):
        train_once(case, Path(sys.argv[1]))
        return 0
    args = parse_args(__doc__)
    rows, cases, missed = [], {}, []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            path = write_recipe(Path(folder), QUICK_DEPTH if args.quick else DEPTH)
            uses, peak = predicted(load(path, CASES[case])), measured(case, path)
        expected = sum(uses.values())
        if abs(peak / expected - 1.0) > BOUND:
            missed.append(f"{case}: {size(peak)} measured, {size(expected)} predicted, bound {BOUND:.0%}")
        cases[case] = {"measured": peak, "predicted": expected, "uses": uses}
        rows.append((case, size(expected), size(peak), f"{peak / expected:.3f}"))
    result = {"environment": environment(torch.device("cpu")), "missed": missed, "cases": cases}
    return report(args, result, ("a run", "predicted", "measured", "measured / predicted"), rows)


if __name__ == "__main__":
    sys.exit(main())
