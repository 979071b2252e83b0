"""Time to open class folders: 200,000 empty files in 1,000 folders, without and with a cached index.

    python scripts/benchmarks/listing.py [--quick] [--each 1280] [--json FILE]

Exits with 1 if a bound is missed. Each opening runs in its own process; times are CPU seconds of `open_data`, without
imports; memory is the increase in peak memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FIRST_SECONDS, SECOND_SECONDS, MEMORY_MB = 10.0, 2.0, 300.0
"""Bounds of any number of files: 20,000 with --quick, 200,000, or ImageNet-1k's 1.28 million with --each 1280."""

OPENING = """
import json, resource, sys, time
from vit_rsst.data.options import DataOptions
from vit_rsst.data.sources import open_data
import datasets, sklearn.model_selection
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.process_time()
data = open_data(DataOptions("folder", sys.argv[1], image_size=32, test_fraction=0.1), 0)
took = time.process_time() - began
memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
images = sum(data.count(split) for split in data.rows)
print(json.dumps({"images": images, "classes": len(data.classes), "cpu_s": took, "memory_mb": memory}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 files in 100 folders")
    parser.add_argument("--each", type=int, default=200, metavar="N", help="files per folder (default 200)")
    parser.add_argument("--json", metavar="FILE", help="also write the result to FILE")
    arguments = parser.parse_args()
    folders, each = 100 if arguments.quick else 1000, arguments.each
    with tempfile.TemporaryDirectory() as place:
        root = write(Path(place, "set"), folders, each)
        found = {name: opened(root, Path(place, "cache")) for name in ("first", "second")}
    missed = []
    for name, seconds in (("first", FIRST_SECONDS), ("second", SECOND_SECONDS)):
        cpu, memory = found[name]["cpu_s"], found[name]["memory_mb"]
        print(f"{name:7} {found[name]['images']:,} images  {cpu:.2f} s of CPU (at most {seconds:g})  {memory:.0f} MB")
        missed += [f"{name}: seconds"] * (cpu > seconds) + [f"{name}: memory"] * (memory > MEMORY_MB)
        assert (found[name]["images"], found[name]["classes"]) == (folders * each, folders)
    if arguments.json:
        bounds = {"first_s": FIRST_SECONDS, "second_s": SECOND_SECONDS, "memory_mb": MEMORY_MB}
        text = json.dumps({"bounds": bounds, "cores": os.cpu_count(), **found, "missed": missed}, indent=2)
        Path(arguments.json).write_text(f"{text}\n", encoding="utf-8")
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return bool(missed)


def write(root: Path, folders: int, each: int) -> Path:
    """Writes empty files; folders get an old timestamp, so that the index caches them."""
    for c in range(folders):
        folder = root / f"class {c:04d}"
        folder.mkdir(parents=True)
        for i in range(each):
            os.close(os.open(f"{folder}/{c}_{i}.jpg", os.O_CREAT))
        os.utime(folder, (1, 1))
    os.utime(root, (1, 1))
    return root


def opened(root: Path, cache: Path) -> dict:
    """One opening, in a fresh process."""
    variables = {**os.environ, "HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", OPENING, str(root)], env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
