from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import GradDrop as Peer

from gradalign.rules import GradDrop
from tests.oracles.graddrop import graddrop
from tests.strategies import SCALES, gradients


def relative_to_terms(J, d):
    """d in units of what each coordinate adds up."""
    size = J.abs().sum(0)
    return d / size.where(size > 0, 1.0)


@given(J=gradients(), scale=SCALES, seed=st.integers(0, 99), data=st.data())
def test_agrees_with_the_paper_on_raw_gradients(J, scale, seed, data):
    J = J * scale
    leak = data.draw(st.one_of(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=len(J), max_size=len(J))))
    uniforms = GradDrop(seed=seed)._uniform(J[0])
    d = GradDrop(leak, seed=seed)(J)
    assert_close(relative_to_terms(J, d), relative_to_terms(J, graddrop(J, uniforms.tolist(), leak)))


def test_by_hand():
    # Purity (1 + (3 - 1)/4)/2 = .75 at every coordinate: the positive 3 where U < .75, else the -1.
    J = torch.tensor([[3.0], [-1.0]]).expand(2, 10_000)
    d = GradDrop(seed=2)(J)
    assert set(d.tolist()) == {3.0, -1.0}
    # The share of a fair draw: standard error sqrt(.75 * .25 / 10,000) = .0043; five of them are allowed.
    assert abs((d > 0).double().mean() - 0.75) < 0.022
    # A leak of .5 adds half of what was dropped.
    assert set(GradDrop(0.5, seed=2)(J).tolist()) == {2.5, 0.5}
    assert set(GradDrop([0.5, 0.0], seed=2)(J).tolist()) == {3.0, 0.5}


@pytest.mark.parametrize("leak", [0.0, 0.5])
def test_the_mean_over_the_draws_is_the_sum(leak):
    # With p the sum of the positive entries and n of the negative ones P = p / (p - n), so the mean of what is kept is
    # P p + (1 - P) n = (p^2 - n^2) / (p - n) = p + n.
    J = torch.tensor([[3.0], [-1.0], [0.5]]).expand(3, 40_000)
    # d is 3.5 or -1, of standard deviation 1.87 at most: standard error .0094; five of them are allowed.
    assert abs(GradDrop(leak, seed=3)(J).mean() - 2.5) < 0.047


@given(J=gradients(), scale=SCALES, seed=st.integers(0, 99))
def test_the_ends_of_the_leak(J, scale, seed):
    J = J * scale
    # All leaks is the sum.
    assert_close(relative_to_terms(J, GradDrop(1.0, seed=seed)(J)), relative_to_terms(J, J.sum(0)))
    # None leaves entries of one sign: d is the sum of the positive or of the negative ones.
    d = relative_to_terms(J, GradDrop(seed=seed)(J))
    up, down = relative_to_terms(J, J.clamp(min=0).sum(0)), relative_to_terms(J, J.clamp(max=0).sum(0))
    assert ((d - up).abs().minimum((d - down).abs()) < 1e-12).all()


@given(J=gradients(), seed=st.integers(0, 99))
def test_coordinates_on_which_all_agree_are_kept_whole(J, seed):
    J = J.abs()
    assert_close(GradDrop(seed=seed)(J), J.sum(0))
    assert_close(GradDrop(seed=seed)(-J), -J.sum(0))


def test_agrees_with_torchjd_where_no_draw_decides():
    # Where all signs agree the purity is 0 or 1 and both keep everything; a leak of 1 keeps everything anywhere.
    J = torch.tensor([[1.0, -2.0, 3.0], [4.0, -1.0, 0.0]])
    assert_close(GradDrop()(J), Peer()(J))
    mixed = torch.randn(3, 50)
    assert_close(GradDrop(1.0)(mixed), Peer(leak=torch.ones(3))(mixed))


def test_agrees_with_torchjd_in_frequency():
    J = torch.tensor([[3.0], [-1.0], [-0.5]]).expand(3, 20_000)
    ours, theirs = GradDrop(0.25, seed=1)(J), Peer(leak=torch.full((3,), 0.25))(J)
    assert set(ours.tolist()) == set(theirs.tolist())
    # Two shares of 20,000 draws: standard error sqrt(2 * .25 / 20,000) = .005; five of them are allowed.
    assert abs((ours > 0).double().mean() - (theirs > 0).double().mean()) < 0.025


def test_all_zero_coordinates_stay_zero():
    assert GradDrop()(torch.tensor([[0.0, 1.0], [0.0, 0.0]])).tolist() == [0.0, 1.0]


def test_blocks_and_calls_draw_anew():
    J = torch.tensor([[1.0], [-1.0]]).expand(2, 64)
    rule = GradDrop(seed=1)
    draws = [tuple(rule(J, block=block).tolist()) for block in (0, 1, 0)]
    assert len(set(draws)) == 3


def test_equal_seeds_draw_alike_and_the_global_generator_is_left_alone():
    J = torch.tensor([[1.0], [-1.0]]).expand(2, 64)
    before = torch.get_rng_state()
    assert torch.equal(GradDrop(seed=7)(J), GradDrop(seed=7)(J))
    assert not torch.equal(GradDrop(seed=7)(J), GradDrop(seed=8)(J))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("leak", [-0.1, 1.1, math.nan, [0.5, 2.0]])
def test_leaks_outside_the_unit_interval_are_refused(leak):
    with pytest.raises(ValueError, match=r"`leak(\[1\])?` must be in \[0, 1\], got"):
        GradDrop(leak)


def test_leaks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"`leak` must be one number or one for each of the 3 loss groups, got 2"):
        GradDrop([0.5, 0.5])(torch.ones(3, 4))
    with pytest.raises(TypeError, match=r"`leak` must be .*got 'x'"):
        GradDrop("x")
