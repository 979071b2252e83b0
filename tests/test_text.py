"""Tables, durations and sizes as text, in any script."""

import pytest

from vit_rsst.text import aligned, duration, size, width_of


def test_columns_are_aligned_in_any_script():
    table = aligned([("class", "F1", "images"), ("剪枝", "9.50", "3"), ("cat", "–", "1,000")], num_left=1)
    assert table.splitlines() == ["class    F1  images", "剪枝   9.50       3", "cat       –   1,000"]
    assert len({width_of(line) for line in table.splitlines()}) == 1


def test_a_left_aligned_last_column_has_no_trailing_spaces():
    assert aligned([("a", "long text"), ("bb", "x")], num_left=2).splitlines() == ["a   long text", "bb  x"]


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0s"), (43, "43s"), (59.6, "1m00s"), (725, "12m05s"), (12_000, "3h20m")]
)
def test_durations(seconds, expected):
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(812, "812 B"), (1024, "1.0 KiB"), (5_000_000, "4.8 MiB"), (2**40, "1024.0 GiB")]
)
def test_sizes(count, expected):
    assert size(count) == expected
