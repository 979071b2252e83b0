"""Fifteen model families, each cut and masked; `scripts/benchmarks/census.py` tries nearly two hundred."""

import sys

import pytest
import tiny

sys.path.insert(0, str(tiny.SCRIPTS / "benchmarks"))
import census


@pytest.mark.parametrize("family", census.QUICK)
def test_a_family_answers_the_same_with_units_masked_and_cut(family):
    row = census.examined(family)
    assert not row.wrong
    assert row.is_cut
    assert 0.5 < row.share < 1.0


def test_the_census_knows_its_families_once():
    assert len(set(census.families())) == len(census.families()) >= 180
    assert len(census.QUICK) == 15
    assert set(census.QUICK) <= set(census.families())
    with_faults = [census.Row("a", wrong="differs"), census.Row("b", verdict={"head": "equal"})]
    assert census.missed(with_faults, 2) == ["a: differs", "1 families have removable units, bound 2"]
