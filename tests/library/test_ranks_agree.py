"""Two and three real processes under DDP and Accelerate: equal masks, zeros, and the weights that one process gets."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
HERE = Path(__file__).parent


def trained(folder: Path, kind: str, criterion: str, world: int) -> tuple[dict, list[dict]]:
    """The weights of rank 0, and what every rank tells."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
    place |= {"PYTHONPATH": f"{HERE}:{tiny.REPOSITORY}", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(HERE / "worker.py"), kind, criterion, str(folder)]
    ranks = [
        subprocess.Popen(
            command, env=tiny.environment(RANK=str(rank), LOCAL_RANK=str(rank), **place), stderr=subprocess.PIPE
        )
        for rank in range(world)
    ]
    for rank in ranks:
        _, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err.decode()[-3000:]
    told = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
    return torch.load(folder / "model.pt", weights_only=True), told


@pytest.mark.parametrize("kind", ["ddp", "accelerate"])
@pytest.mark.parametrize("criterion", ["magnitude", "activation_l2"])
def test_processes_agree_and_end_where_one_ends(tmp_path, kind, criterion):
    alone, [one] = trained(tmp_path / "one", kind, criterion, 1)
    for world in (2, 3):
        weights, told = trained(tmp_path / str(world), kind, criterion, world)
        for rank in told:
            assert rank["masks"] == told[0]["masks"]
            assert all(len(set(prints)) == 1 and len(prints) == world for prints in rank["masks"])
        assert told[0]["masks"] == [prints * world for prints in one["masks"]]
        assert told[0]["ratio"] == pytest.approx(one["ratio"], rel=1e-3)
        for name, value in alone.items():
            assert torch.allclose(weights[name], value, atol=1e-4), name


def test_compensated_weights_are_bit_for_bit_the_same_on_all_ranks_and_those_of_one_process(tmp_path):
    alone, [one] = trained(tmp_path / "one", "prune", "magnitude", 1)
    for world in (2, 3):
        weights, told = trained(tmp_path / str(world), "prune", "magnitude", world)
        assert all(rank == told[0] for rank in told)
        assert (told[0]["masks"], told[0]["tokens"]) == (one["masks"], one["tokens"])
        for name, value in alone.items():
            assert torch.allclose(weights[name], value, atol=1e-4), name
