"""Benchmarks that count what a GPU would do, and the rehearsal of those that run on one."""

import json

import pytest
import tiny


@pytest.mark.slow  # compiles, and trains four runs
@pytest.mark.timeout(1200)
def test_all_parts_of_the_gpu_benchmark_are_rehearsed(tmp_path):
    script = tiny.SCRIPTS / "benchmarks" / "gpu.py"
    done = tiny.python(script, "--rehearse", "--json", tmp_path / "gpu.json", "--minutes", 15, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for part, fewest in {"a": 13, "b": 7, "c": 5, "e": 14, "d": 4}.items():
        rows = json.loads((tmp_path / f"gpu-{part}.json").read_text())["rows"]
        assert len(rows) >= fewest
        assert (tmp_path / f"gpu-{part}.md").read_text().count("\n| ") >= fewest
    assert {row["state"] for row in rows.values()} == {"finished"}


def test_no_step_waits_for_its_device_and_pruning_adds_few_kernels():
    done = tiny.python(tiny.SCRIPTS / "benchmarks" / "launches.py", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rsst in its window, ema" in done.stdout


@pytest.mark.slow
def test_the_peers_are_compared_on_a_few_images(tmp_path):
    done = tiny.python(tiny.SCRIPTS / "benchmarks" / "peers.py", "--quick", "--json", tmp_path / "p.json", timeout=240)
    found = json.loads((tmp_path / "p.json").read_text())  # times of so few images may miss the bound
    assert found["seconds"].keys() == {"vit-rsst", "timm", "Trainer"}, done.stdout + done.stderr
    assert len(set(found["parameters"].values())) == 1


KEPT = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import peers

calls, interrupted_at, part = [], 5, Path(sys.argv[2])

def whole_process(name, data, number):
    calls.append(name)
    if len(calls) == interrupted_at:
        raise RuntimeError
    return {"everything": float(len(calls))}

peers.whole_process = whole_process
try:
    peers.measure(Path(), 8, 3, part)
except RuntimeError:
    pass
first = len(calls)
found = peers.measure(Path(), 8, 3, part)
assert (first, len(calls), len(found)) == (5, 5 + 6, 3), "one of three was kept whole"
assert all(set(times) == {"vit-rsst", "timm", "Trainer"} for times in found)
assert sorted(times["everything"] for times in found[0].values()) == [1.0, 2.0, 3.0]
assert peers.measure(Path(), 8, 3, part) == found and len(calls) == 11
part.write_text(part.read_text().replace('"cores": ', '"cores": 9'))
peers.measure(Path(), 8, 3, part)
assert len(calls) == 11 + 9, "another machine begins anew"
"""


def test_the_peers_go_on_from_whole_alternations_of_the_same_machine(tmp_path):
    done = tiny.python("-c", KEPT, tiny.SCRIPTS / "benchmarks", tmp_path / "p.json.part")
    assert done.returncode == 0, done.stderr


def test_the_command_that_is_recorded_has_all_arguments_and_no_absolute_path():
    argv = ["/a/b/data.py", "--quick", "--cifar", "/c/cifar 10", "--json", "r/x.json"]
    code = f"import sys; sys.path.insert(0, sys.argv[1]); import _common; print(_common.command({argv}))"
    done = tiny.python("-c", code, tiny.SCRIPTS / "benchmarks")
    assert done.stdout == "python scripts/benchmarks/data.py --quick --cifar 'cifar 10' --json r/x.json\n", done.stderr
