"""Runs that are interrupted and go on end as the undisturbed ones; `scripts/benchmarks/interruptions.py` tries all."""

import sys

import pytest
import tiny

sys.path.insert(0, str(tiny.REPOSITORY / "scripts" / "benchmarks"))
import interruptions
from interruptions import Bench, Cell, Setting

CELLS = [
    Cell(Setting("in memory", 2, 0), "after removal", "KILL"),
    Cell(Setting("stream", 2, 0), "mid-epoch", "TERM"),
    Cell(Setting("two buckets", 3, 0), "mid-epoch", "TERM"),
    Cell(Setting("sharded", 2, 0), "gathering of a save", "KILL"),
]
SLOW = [
    Cell(Setting("in memory", 1, 0), "evaluation", "TERM"),
    Cell(Setting("map-style", 1, 0), "first step of a round", "TERM"),
    Cell(Setting("techniques", 2, 0), "penalty window", "TERM"),
    Cell(Setting("stream", 1, 2), "epoch end", "KILL"),
    Cell(Setting("map-style", 1, 2), "penalty window", "KILL"),
    Cell(Setting("stream", 2, 2), "evaluation", "TERM"),
    *(
        Cell(Setting("two buckets", 4, 0), moment, name)
        for moment, name in (("mid-epoch", "TERM"), ("epoch end", "KILL"))
    ),
    *(
        Cell(Setting("two buckets", 3, 0), moment, name)
        for moment, name in (("penalty window", "KILL"), ("evaluation", "TERM"))
    ),
    *(cell for cell in interruptions.CELLS if cell.setting == Setting("sharded", 3, 0) and cell.signal == "KILL"),
    *(cell for cell in interruptions.CELLS if cell.setting == Setting("sharded", 2, 0) and cell.signal == "TERM"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("interruptions"))


def marks(cell: Cell) -> list:
    on_gpus = cell.setting == Setting("two buckets", 3, 0)
    return [*([pytest.mark.slow] if cell in SLOW else []), *([pytest.mark.nccl] if on_gpus else [])]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cell", [pytest.param(cell, marks=marks(cell), id=str(cell)) for cell in (*CELLS, *SLOW)])
def test_an_interrupted_run_ends_as_the_undisturbed_one(bench, cell):
    survived, why = bench.survives(cell)
    assert survived, why


def test_every_cell_is_one_that_means_something():
    assert len(interruptions.CELLS) == 13 * 6 * 2 + 2 * 12 * 2
    assert len({str(cell) for cell in interruptions.CELLS}) == len(interruptions.CELLS)


@pytest.mark.slow
def test_without_settled_buckets_three_ranks_resume_to_other_numbers(tmp_path):
    """So that the cells above can fail."""
    bench = Bench(tmp_path / "unsettled")
    bench.settles = False
    survived, why = bench.survives(Cell(Setting("two buckets", 3, 0), "mid-epoch", "TERM"))
    assert not survived
    assert "tickets" in why, why


def test_a_difference_of_one_batch_is_seen(bench):
    setting = Setting("in memory", 1, 0)
    expected = bench.undisturbed(setting)
    broken = {**expected, "batches": {name: {**steps, 3: {"other"}} for name, steps in expected["batches"].items()}}
    bench._undisturbed[setting] = broken
    try:
        survived, why = bench.survives(Cell(setting, "mid-epoch", "KILL"))
    finally:
        bench._undisturbed[setting] = expected
    assert not survived
    assert why == "batches differ"
