"""Measurements: memory and training steps of a network, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from vit_rsst.errors import MissingRequirement
from vit_rsst.tickets.trained import default_device


def probe(header: dict[str, str], image_size: int, batch: int, train_batch: int | None = None) -> dict:
    """Peak memory of inference and of training steps, measured in a fresh process.

    Args:
        header: of the network to build; random weights, which change neither memory nor time.
        batch: images per forward pass.
        train_batch: images per training step, halved until it fits free memory and time limit; None: no training.

    Returns:
        `kind`: `rss`, resident memory of the process including libraries, or `cuda`, memory allocated by torch. Bytes
        `before` the network is built and at the peak of `inference` and, if asked for, `training`; `train_batch` and
        `step`, the time of a training step.

    Raises:
        MissingRequirement: the process failed, for example out of memory.
    """
    spec = {"header": header, "image_size": image_size, "batch": batch, "train_batch": train_batch}
    spec |= {"threads": torch.get_num_threads(), "device": str(default_device())}
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "vit_rsst.analysis.probe"],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise MissingRequirement(
            f"{header['architecture']}: memory could not be measured ({reason}); use --no-latency to skip measurements."
        )
    return json.loads(done.stdout.splitlines()[-1])
