from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import TrimmedMean as Peer

from gradalign.rules import TrimmedMean
from tests.oracles.trimmed_mean import trimmed_mean
from tests.strategies import SCALES, gradients


def relative(J, d):
    size = J.abs().amax(0)
    return d / size.where(size > 0, 1.0)


@given(J=gradients(), scale=SCALES, data=st.data())
def test_agrees_with_the_paper_on_raw_gradients(J, scale, data):
    trim = data.draw(st.integers(0, (len(J) - 1) // 2), label="trim")
    J = J * scale
    d = TrimmedMean(trim)(J)
    assert_close(relative(J, d), relative(J, trimmed_mean(J, trim)))
    assert_close(d, Peer(trim)(J))


@given(J=gradients(), scale=SCALES)
def test_the_ends_of_the_range(J, scale):
    # Nothing trimmed is the mean; as much as can be leaves the median, of an odd number.
    J = J * scale
    assert_close(relative(J, TrimmedMean(0)(J)), relative(J, J.mean(0)))
    if len(J) % 2:
        assert_close(TrimmedMean(len(J) // 2)(J), J.median(0).values)


@given(J=gradients(min_groups=3), scale=SCALES, data=st.data())
def test_one_adversary_moves_the_mean_no_further_than_the_others_reach(J, scale, data):
    J = J * scale
    liar = data.draw(st.integers(0, len(J) - 1), label="liar")
    honest = torch.cat([J[:liar], J[liar + 1 :]])
    J[liar] = data.draw(st.sampled_from([1e30, -1e30]))
    d = TrimmedMean()(J)
    rounding = 1e-12 * honest.abs().amax(0)
    assert ((d >= honest.amin(0) - rounding) & (d <= honest.amax(0) + rounding)).all()


def test_by_hand():
    # 1, 5, -3, 9 without -3 and 9: 3. 0, 0, 7, 1 without 0 and 7: .5.
    J = torch.tensor([[1.0, 0.0], [5.0, 0.0], [-3.0, 7.0], [9.0, 1.0]])
    assert TrimmedMean()(J).tolist() == [3.0, 0.5]


def test_too_few_groups_are_refused():
    with pytest.raises(ValueError, match=r"must have more than 2 loss groups for trim=1, got 2"):
        TrimmedMean()(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"must have more than 4 loss groups for trim=2, got 4"):
        TrimmedMean(2)(torch.ones(4, 4))


def test_a_trim_that_is_no_count_is_refused():
    with pytest.raises(ValueError, match=r"`trim` must be .*got -1"):
        TrimmedMean(-1)
    with pytest.raises(TypeError, match=r"`trim` must be an integer, got 0.5"):
        TrimmedMean(0.5)
