"""The report of deviations, `python -m tests.oracles`: it has every rule; where nothing is hard it finds nothing."""

from __future__ import annotations

import pytest

from gradalign import rules
from tests.oracles import cases_others, cases_symmetric
from tests.oracles.__main__ import badly_scaled, full_rank, largest

CASES = {**cases_symmetric.CASES, **cases_others.CASES}


def test_every_rule_has_a_case():
    assert sorted(CASES) == rules.names()


@pytest.mark.parametrize("name", CASES)
def test_no_rule_is_far_from_its_paper(name):
    # SDMGrad's steps of 10 magnify rounding; the others' is that of G.
    assert largest(CASES[name], full_rank) <= (1e-6 if name == "sdmgrad" else 1e-9)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"aligned-mtl"}))  # whose eigenvalues carry the largest's rounding
def test_norms_that_differ_by_24_orders_make_no_difference(name):
    assert largest(CASES[name], badly_scaled) <= 1e-9
