"""The order of the files, the longest first, so that no process is left with one of them when the others are done; and
what every test of a folder begins with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

LONGEST = (
    "test_readme.py",
    "test_distributed.py",
    "test_cluster.py",
    "test_faults.py",
    "test_interruptions.py",
    "test_export.py",
    "test_cli.py",
    "test_heartbeat.py",
    "test_launcher.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def units_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits whose last ticket lacks half of its heads and neurons; to be read only."""
    import tiny

    folder = tmp_path_factory.mktemp("units")
    assert tiny.command("train", tiny.write_recipe(folder, tiny.UNITS)) == 0
    return folder / "runs" / "units"


@pytest.fixture(autouse=True)
def one_thread_and_a_fresh_accelerate(request: pytest.FixtureRequest) -> Iterator[None]:
    """In `library/` and `pruning/`, whose tests build runs of their own: sums in one order, and neither precision nor
    accumulation of the test before, which Accelerate keeps global."""
    if request.path.parent == Path(__file__).parent:
        yield
        return
    import torch
    from accelerate.state import AcceleratorState, GradientState

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
