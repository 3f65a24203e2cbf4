from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import KrumWeighting

from gradalign.rules import Krum
from tests.oracles.agreement import assert_agrees
from tests.oracles.krum import krum, krum_scores
from tests.strategies import SCALES, gradients, gramian_of


def clearly_ranked(J, f, m):
    """The m-th lowest score and the next differ by more than the rounding of the distances in G."""
    scores = sorted(krum_scores(J, f))
    return m == len(J) or scores[m] - scores[m - 1] > 1e-12 * float((J * J).sum(1).max())


@given(J=gradients(min_groups=3), scale=SCALES, data=st.data())
def test_agrees_with_the_paper_on_raw_gradients(J, scale, data):
    f = data.draw(st.integers(0, len(J) - 3), label="f")
    m = data.draw(st.integers(1, len(J)), label="m")
    J = J * scale
    assume(clearly_ranked(J, f, m))
    assert_agrees(J, Krum(f, m)(gramian_of(J)), krum(J, f, m))


@given(J=gradients(min_groups=3), scale=SCALES, data=st.data())
def test_the_weights_are_equal_shares_of_the_selected(J, scale, data):
    m = data.draw(st.integers(1, len(J)), label="m")
    w = Krum(0, m)(gramian_of(J * scale))
    assert sorted(w.tolist()) == pytest.approx([0.0] * (len(J) - m) + [1 / m] * m)


def test_by_hand():
    # On a line at 0, 1, 3 and 100: with K - f - 2 = 2 the scores are 1 + 9, 1 + 4, 4 + 9 and far more. Not squared,
    # they would be 4, 3, 5: the same here, so m = 1 takes the second and m = 2 the first beside it.
    J = torch.tensor([[0.0], [1.0], [3.0], [100.0]])
    assert Krum()(J @ J.T).tolist() == [0.0, 1.0, 0.0, 0.0]
    assert Krum(0, 2)(J @ J.T).tolist() == [0.5, 0.5, 0.0, 0.0]
    assert Krum(0, 4)(J @ J.T).tolist() == [0.25] * 4


def test_the_distances_are_squared():
    # Two nearest count. Twins with a third at 3: squared 0 + 9, plain 0 + 3. Far away a middle between two at 1.6:
    # squared 2.56 + 2.56 = 5.12, the lowest; plain 3.2, more than the twins' 3.
    J = torch.tensor([[0.0], [0.0], [3.0], [100.0], [101.6], [98.4]], dtype=torch.float64)
    assert Krum(2)(J @ J.T).tolist() == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def test_an_adversary_is_never_chosen():
    J = torch.cat([torch.ones(4, 3) + 0.01 * torch.randn(4, 3), torch.tensor([[-50.0, 80.0, 9.0]])]).double()
    assert Krum(1, 4)(J @ J.T)[4] == 0


def test_ties_go_to_the_lower_index():
    # Corners of an equilateral triangle, and copies of one point: every score is the same.
    assert Krum()(torch.eye(3)).tolist() == [1.0, 0.0, 0.0]
    assert Krum(0, 2)(torch.ones(4, 4)).tolist() == [0.5, 0.5, 0.0, 0.0]


@given(J=gradients(min_groups=3, max_groups=3))
def test_agrees_with_torchjd_on_three_groups(J):
    # With one nearest neighbour the order of distances is that of their squares, and the nearest pair is selected.
    # TorchJD adds plain distances, the paper squared ones: from two neighbours on they may choose differently.
    assume(clearly_ranked(J, 0, 2))
    G = gramian_of(J)
    assert_close(Krum(0, 2)(G), KrumWeighting(0, 2)(G))


def test_too_few_groups_are_refused():
    with pytest.raises(ValueError, match=r"must have at least 3 loss groups, got 2"):
        Krum()(torch.eye(2))
    with pytest.raises(ValueError, match=r"must have at least 5 loss groups.*, got 4"):
        Krum(2)(torch.eye(4))
    with pytest.raises(ValueError, match=r"must have at least 6 loss groups.*, got 4"):
        Krum(0, 6)(torch.eye(4))


@pytest.mark.parametrize(("name", "value"), [("num_byzantine", -1), ("num_selected", 0)])
def test_counts_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be .*got {value}"):
        Krum(**{name: value})


@pytest.mark.parametrize("name", ["num_byzantine", "num_selected"])
@pytest.mark.parametrize("value", [1.5, True])
def test_counts_that_are_no_integers_are_refused(name, value):
    with pytest.raises(TypeError, match=rf"`{name}` must be an integer, got {value}"):
        Krum(**{name: value})
