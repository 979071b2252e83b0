"""The order of the files: the longest first, so that no process is left with one of them when the others are done."""

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
