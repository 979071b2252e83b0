"""Memory of a process and cost of pruning under FSDP2, with two gloo processes on the CPU.

Memory: vit_base (85 M parameters) with AdamW in an rsst round, from before the model is built to after two steps; the
highest resident memory minus that before, of the rank that needs most, under FSDP2 and under DDP. The bound holds where
freed memory goes back to the system (MALLOC_MMAP_THRESHOLD_=65536), as it does on a GPU; glibc's defaults, which keep
much of it, are shown beside it.

Time: a step inside the window of an rsst round and one after its removal, against one without pruning, all under FSDP2.
The runs alternate in short blocks, in the same random order on both ranks; `no pruning, again` shows the noise.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from _common import Interval, alternate, environment, interval, parse_args, report
from _runs import begin_run, train_epoch

from vit_rsst.data.tables import Split
from vit_rsst.pruning.methods.dense import Dense
from vit_rsst.pruning.methods.rsst import Rsst
from vit_rsst.pruning.plan import Penalty
from vit_rsst.recipe.schema import Augment, Data, Model, Optim, Pruning, Recipe, Schedule, Train

MEMORY_BOUND = 0.6
"""Maximum ratio of FSDP2's memory to DDP's, with two processes."""
STEP_BOUND = 1.05
"""Maximum ratio of a pruned step to one without pruning."""

MMAP = "MALLOC_MMAP_THRESHOLD_"
"""Variable of glibc; set low, freed tensors go back to the system, and resident memory is what tensors need."""

RANKS, WARMUPS = 2, 2
ALTERNATIONS, QUICK_ALTERNATIONS = 20, 3
BATCH, STEPS, SPARSITY = 32, 2, 0.5
BARE = "no pruning"
PHASES = {"inside the window": 1.0, "after the removal": 0.0}


def recipe(folder: Path, name: str, model: str, batch: int, blocks: int, window: float | None) -> Recipe:
    """Round 0 dense, round 1 with a penalty over this fraction of it; None: no pruning. An epoch is a block."""
    end = window or 1 / blocks
    method = Dense() if window is None else Rsst(Penalty(window=(0.0, end)), remove_at=end)
    return Recipe(
        name=name.replace(" ", "-").replace(",", ""),
        output_dir=str(folder),
        model=Model(name=model),
        data=Data(source="digits", augment=Augment(hflip=0.5)),
        optim=Optim(name="adamw"),
        train=Train(epochs=blocks, round_epochs=blocks, steps_per_epoch=STEPS, global_batch=batch),
        pruning=Pruning(method=method, schedule=Schedule(rounds=1, final_sparsity=SPARSITY)),
    )


def images(number: int) -> Split:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (number, 3, 32, 32), dtype=torch.uint8, generator=random)
    return Split(pixels, torch.arange(number) % 10)


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def memory(folder: Path) -> int:
    """Bytes that this rank needs for two steps of vit_base."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    run = begin_run(recipe(folder, "memory", "vit_base", 8, 2, 1.0), images(8 * STEPS), round=1)
    train_epoch(run)
    run.ranks.heartbeat.close()
    return resident("VmHWM") - before


def peaks(folder: Path) -> dict[str, int]:
    """Bytes of the rank that needs most, by way of training."""
    return {name: max(on_ranks(memory, folder / name, is_sharded=name == "FSDP2")) for name in ("DDP", "FSDP2")}


def times(folder: Path, num_alternations: int) -> dict[str, list[float]]:
    """Seconds of each block, by run."""
    blocks, split = WARMUPS + num_alternations + 1, images(BATCH * STEPS)
    windows = {BARE: None, f"{BARE}, again": None, **PHASES}
    runs = {
        name: begin_run(recipe(folder, name, "vit_tiny", BATCH, blocks, window), split, round=int(window is not None))
        for name, window in windows.items()
    }
    contenders = {name: lambda run=run: train_epoch(run) for name, run in runs.items()}
    seconds = alternate(contenders, num_alternations, WARMUPS, torch.device("cpu"))
    assert runs["inside the window"].controller.condemned is not None
    assert round(runs["after the removal"].controller.mask.density, 3) == 1 - SPARSITY
    for run in runs.values():
        run.ranks.heartbeat.close()
    return {name: values.tolist() for name, values in seconds.items()}


def on_ranks(work: Callable, *arguments: object, is_sharded: bool) -> list:
    """What `work` returns on each of the ranks, in processes of their own."""
    context, results = multiprocessing.get_context("spawn"), multiprocessing.get_context("spawn").Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    launch |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
    launch |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if is_sharded else {}
    processes = []
    for rank in range(RANKS):
        variables = {k: str(v) for k, v in (launch | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        processes.append(context.Process(target=_ranked, args=(results, rank, variables, work, arguments)))
        processes[-1].start()
    found = dict(results.get(timeout=1800) for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(RANKS)]


def _ranked(results: object, rank: int, variables: dict[str, str], work: Callable, arguments: tuple) -> None:
    os.environ |= variables
    torch.set_num_threads(1)
    results.put((rank, work(*arguments)))
    torch.distributed.barrier()


def main() -> int:
    args = parse_args(__doc__)
    num_alternations, missed, rows = QUICK_ALTERNATIONS if args.quick else ALTERNATIONS, [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        kept = peaks(path / "defaults")
        os.environ[MMAP] = "65536"
        peak = peaks(path / "returned")
        del os.environ[MMAP]
        seconds = on_ranks(times, path / "times", num_alternations, is_sharded=True)[0]
    share = peak["FSDP2"] / peak["DDP"]
    for name, num_bytes in peak.items():
        rows.append((f"vit_base, {name}", f"{num_bytes / 2**20:.0f} MiB", "", ""))
    rows.append(("memory of FSDP2 to that of DDP", "", f"{share:.3f}", str(MEMORY_BOUND)))
    held = f"{kept['DDP'] / 2**20:.0f} MiB, FSDP2 {kept['FSDP2'] / 2**20:.0f} MiB"
    rows.append(("with glibc's defaults: DDP", held, f"{kept['FSDP2'] / kept['DDP']:.3f}", ""))
    if share > MEMORY_BOUND:
        missed.append(f"FSDP2 takes {share:.3f} of DDP's memory, bound {MEMORY_BOUND}")
    timings = {}
    for name, values in seconds.items():
        ratio, bound = interval(np.array(values) / np.array(seconds[BARE])), STEP_BOUND if name in PHASES else None
        milliseconds = 1000 * float(np.median(values)) / STEPS
        rows.append((f"step, {name}", f"{milliseconds:.1f} ms", str(ratio), str(bound or "")))
        timings[name] = {"ms_a_step": round(milliseconds, 2), "ratio": asdict(ratio), "bound": bound}
        if bound is not None and Interval(**asdict(ratio)).exceeds(bound):
            missed.append(f"{name}: a step takes {ratio} of one without pruning, bound {bound}")
    result = {
        "environment": environment(torch.device("cpu")),
        "load": os.getloadavg()[0],
        "alternations": num_alternations,
        "missed": missed,
        "peak_bytes": peak,
        "peak_bytes_with_glibcs_defaults": kept,
        "steps": timings,
    }
    return report(args, result, ("sharding, two processes", "", "ratio  [95 %]", "bound"), rows)


if __name__ == "__main__":
    sys.exit(main())
