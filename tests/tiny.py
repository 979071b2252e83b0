"""Runs that take a second: a tiny recipe on the digits, and the command started within the test process or beside it.

Not a test module: what the tests of the command line, the run folder, tickets and models have in common.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "vit_rsst"
SCRIPTS = REPOSITORY / "scripts"

VISIBLE = "CUDA_VISIBLE_DEVICES"
ON_GPUS = os.environ.get("VIT_RSST_RANKS") == "cuda"
"""Processes of their own train on GPUs, over NCCL; from NCCL 2.30 on, several of them may share one."""

MODEL_ARGS = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "mlp_ratio": 1.0}
NUM_PRUNABLE = 24 * 72 + 24 * 24 + 24 * 24 + 24 * 24  # qkv, proj, fc1, fc2

RECIPE = f"""\
name: tiny
data: {{source: digits}}
model: {{name: vit_tiny, args: {json.dumps(MODEL_ARGS)}}}
optim: {{lr: 3e-3}}
train: {{epochs: 2, round_epochs: 2, global_batch: 32, steps_per_epoch: 3, log_every_steps: 1}}
pruning:
  method: {{name: rsst, remove_at: 0.8}}
  schedule: {{rounds: 2, final_sparsity: 0.9}}
tracking: {{figures: false}}
"""

UNITS = RECIPE.replace("name: tiny", "name: units").replace("0.9", "0.5").replace(
    "pruning:\n", "pruning:\n  granularity: head+neuron\n"
)  # fmt: skip


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    """A recipe file whose runs go to `folder`/runs."""
    path = folder / "tiny.yaml"
    if ON_GPUS:
        text = text.replace("train: {", "train: {deterministic: true, ")
    path.write_text(f"{text}output_dir: {folder / 'runs'}\n", encoding="utf-8")
    return path


COLUMNS = {"cifar10": ("img", "label"), "cifar100": ("img", "fine_label"), "imagenet1k": ("image", "label")}


def write_images(folder: Path, source: str, rows: int = 120, size: int = 16, scored: int = 6) -> Path:
    """Noise of three classes for training and for the test, as the Hub's parquet files of a source."""
    import datasets
    import numpy as np
    from PIL import Image

    from vit_rsst.data.catalog import CATALOG

    image, label = COLUMNS[source]
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=["a", "b", "c"])})
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, count in (("train", rows), (CATALOG[source].test_split, scored)):
        images = [Image.fromarray(draw.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(count)]
        table = datasets.Dataset.from_dict({image: images, label: [i % 3 for i in range(count)]}, features=features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def command(*argv: object) -> int:
    """Runs `vit-rsst ARGV…` within this process, on the CPU with one thread; returns the exit code."""
    from vit_rsst import cli

    with alone_on_cpu():
        return cli.main([str(item) for item in argv])


class TrainerHere:
    """A trainer within this process, in place of the `subprocess.Popen` of one.

    Attributes:
        started: names of the runs, in order; None: nobody wants to know.
    """

    started: list[str] | None = None

    def __init__(self, argv: list[str], stdout: object, **_: object):
        assert argv[:3] == [sys.executable, "-m", "vit_rsst.train"]
        with contextlib.redirect_stderr(stdout):
            self.returncode = command("train", *argv[3:])
        if self.started is not None:
            self.started.append(next(item for item in argv if item.startswith("name="))[5:])

    def poll(self) -> int:
        return self.returncode

    def terminate(self) -> None:
        """It has ended already."""


@contextlib.contextmanager
def alone_on_cpu() -> Iterator[None]:
    """A process as a fresh `vit-rsst` finds it; what a run changes of the process is put back after it."""
    import numpy as np
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    variables, threads = dict(os.environ), torch.get_num_threads()
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(name, None)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()
        os.environ.clear()
        os.environ.update(variables)
        torch.set_num_threads(threads)
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def environment(**more: str) -> dict[str, str]:
    """Environment of a subprocess: this package, one thread, no network, nothing of a launcher, and no GPU, unless
    `ON_GPUS`."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith("ACCELERATE_")}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), kept.get("PYTHONPATH"))))
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    found = kept | offline | {"PYTHONPATH": path} | more
    return gpus(found) if ON_GPUS else found


def local_rank(rank: int) -> int:
    """Of a rank on this machine; those that share a GPU share a number, since Accelerate takes it for the GPU's."""
    import torch

    return rank % torch.cuda.device_count() if ON_GPUS else rank


def gpus(variables: dict[str, str]) -> dict[str, str]:
    """The same environment with the GPUs of this process."""
    kept = {name: value for name, value in variables.items() if name not in ("ACCELERATE_USE_CPU", VISIBLE)}
    visible = {VISIBLE: os.environ[VISIBLE]} if VISIBLE in os.environ else {}
    return kept | visible | {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}


def python(*argv: object, timeout: float = 60, **variables: str) -> subprocess.CompletedProcess:
    """Runs python beside this process; its output is text."""
    arguments = [sys.executable, *map(str, argv)]
    return subprocess.run(
        arguments, env=environment(**variables), capture_output=True, text=True, timeout=timeout, check=False
    )


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text(encoding="utf-8"))


def events(run: Path) -> list[dict]:
    """metrics.jsonl, read as strict JSON: NaN and Infinity are no JSON."""

    def refuse(token: str) -> object:
        raise ValueError(f"{token} is not JSON")

    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]
