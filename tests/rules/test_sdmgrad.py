from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchjd.aggregation import SDMGradWeighting

from gradalign.rules import SDMGrad
from tests.oracles.agreement import assert_close_for, steps_from, well_posed
from tests.oracles.modo import stepped_batch
from tests.oracles.sdmgrad import SDMGrad as Paper
from tests.strategies import SCALES, full_rank, gradients, gramian_of

PAIR = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)


@given(J=gradients(), scale=SCALES, lam=st.sampled_from([0.0, 0.3, 2.0]), seed=st.integers(0, 99))
def test_agrees_with_the_paper_on_raw_gradients(J, scale, lam, seed):
    rule, paper = SDMGrad(lam, lr=0.3), Paper(lam, lr=0.3)
    for step in steps_from(J * scale, seed):
        assert_close_for(step, step.T @ rule(gramian_of(step)), paper(step))


@given(J=gradients(), scale=SCALES, seed=st.integers(0, 99))
def test_agrees_with_the_paper_at_its_own_learning_rate(J, scale, seed):
    # At lr = 10 the steps overshoot: away from the corners of the simplex they magnify what rounding differs by.
    steps = steps_from(J, seed, count=3)
    assume(well_posed(Paper, steps))
    rule, paper = SDMGrad(), Paper()
    for step in steps:
        scaled = step * scale
        # What may be magnified a thousandfold in each of three calls.
        assert_close_for(scaled, scaled.T @ rule(gramian_of(scaled)), paper(scaled), tolerance=1e-7)


@pytest.mark.parametrize("batches", [2, 3])
@given(data=st.data(), scale=SCALES, seed=st.integers(0, 99))
def test_agrees_with_the_paper_on_independent_batches(batches, data, scale, seed):
    # Batches that agree, as those of one training set do: unlike ones would have no mean norm to measure A by.
    part = data.draw(st.integers(1, 3).flatmap(full_rank), label="J") * scale
    rule, paper = SDMGrad(lr=0.1, batches=batches), Paper(lr=0.1, batches=batches)
    for number in range(3):
        step = torch.cat(steps_from(part, seed + 100 * number, count=batches + 1)[-batches:])
        assume(bool(((step[: len(part)] * step[len(part) : 2 * len(part)]).sum(1) > 0).all()))
        assert_close_for(step, step.T @ rule(gramian_of(step)), paper(step))


@given(J=gradients(), preference=st.lists(st.floats(0.01, 1), min_size=6, max_size=6))
def test_agrees_with_the_paper_for_another_preference(J, preference):
    total = sum(preference[: len(J)])
    p = [x / total for x in preference[: len(J)]]
    w = SDMGrad(lr=0.3, preference=p)(gramian_of(J))
    assert_close_for(J, J.T @ w, Paper(lr=0.3, preference=p)(J))


@given(J=gradients(), scale=SCALES)
def test_the_weights_are_on_the_simplex(J, scale):
    w = SDMGrad()(gramian_of(J * scale))
    assert (w >= 0).all()
    assert_close(w.sum(), torch.ones_like(w.sum()))


@given(J=st.integers(1, 3).flatmap(lambda n: full_rank(2 * n)), scale=SCALES)
def test_the_weights_are_on_the_simplex_whatever_the_batches_say(J, scale):
    # Batches that contradict each other leave no mean norm; the weights must be weights all the same.
    J = torch.cat([J[: len(J) // 2], -J[: len(J) // 2]]) * scale
    w = SDMGrad(batches=2)(gramian_of(J))
    assert (w >= 0).all()
    assert_close(w.sum(), torch.ones_like(w.sum()))


@pytest.mark.parametrize(("lam", "lr", "expected"), [(0.0, 0.5, [0.75, 0.25]), (1.0, 0.25, [0.625, 0.375])])
def test_one_iteration_by_hand(lam, lr, expected):
    # Norms 1 and 3, mean 2: A = diag(1, 9)/4. At lam = 0 the slope is A (.5, .5) = (.125, 1.125) and
    # (.5, .5) - .5 (.125, 1.125) = (.4375, -.0625), on the simplex (.75, .25). At lam = 1 the slope doubles, lr halves,
    # and the weights are ((.75, .25) + (.5, .5))/2.
    G = torch.tensor([[1.0, 0.0], [0.0, 9.0]])
    assert_close(SDMGrad(lam, lr, iterations=1)(G), torch.tensor(expected))


def test_two_iterations_with_momentum_by_hand():
    # As above at lr = .2: v = (.125, 1.125), w = (.475, .275) -> (.6, .4); then A w = (.15, .9) and
    # v = .5 v + (.15, .9) = (.2125, 1.4625), w = (.5575, .1075) -> (.725, .275).
    G = torch.tensor([[1.0, 0.0], [0.0, 9.0]])
    assert_close(SDMGrad(0.0, 0.2, 0.5, 2)(G), torch.tensor([0.725, 0.275]))


def test_many_small_steps_reach_the_least_norm_combination():
    # lam = 0 minimises |J'w| over the simplex: MGDA's (.6, .4). The step contracts the error by .55 each time.
    rule = SDMGrad(0.0, lr=0.1, momentum=0.0)
    for _ in range(10):
        w = rule(PAIR @ PAIR.T)
    assert_close(w, torch.tensor([0.6, 0.4], dtype=torch.float64))


def test_the_weights_are_kept_and_the_velocity_is_not():
    # One call of two iterations differs from two calls of one exactly by the momentum.
    G = PAIR @ PAIR.T
    twice = SDMGrad(0.0, 0.1, 0.5, 1)
    twice(G)
    w = twice(G)
    assert_close(w, SDMGrad(0.0, 0.1, 0.0, 2)(G))
    assert not torch.allclose(w, SDMGrad(0.0, 0.1, 0.5, 2)(G))


def test_only_the_batches_that_the_parameters_step_along_get_weights():
    G = gramian_of(torch.randn(6, 8, dtype=torch.float64))
    third = SDMGrad(batches=3)(G)
    assert not third[:4].any()
    assert_close(third.sum(), torch.ones_like(third.sum()))
    half = SDMGrad(batches=2)(G[:4, :4])
    assert torch.equal(half[:2], half[2:])
    assert_close(half.sum(), torch.ones_like(half.sum()))


@pytest.mark.parametrize("batches", [1, 3])
@given(data=st.data(), seed=st.integers(0, 99))
def test_agrees_with_torchjd(batches, data, seed):
    K = data.draw(st.integers(1, 3), label="K")
    J = data.draw(full_rank(batches * K), label="J")
    ours, theirs = SDMGrad(lr=0.1, batches=batches), SDMGradWeighting(lr=0.1)
    for step in steps_from(J, seed, count=3):
        parts = step.split(K)
        scale = (parts[0] * parts[min(1, batches - 1)]).sum(1).clamp(min=0).sqrt().mean()
        A = parts[0] @ parts[min(1, batches - 1)].T
        assume(scale > 0.1)
        assume((A.abs() < 10 * scale**2).all())  # longer steps magnify that difference from one to the next
        w = theirs(A)
        # TorchJD divides by scale^2 + 1e-8, so its matrix is smaller by up to a part in 1e6, and so are its steps.
        assert_close(stepped_batch(parts).T @ w, step.T @ ours(gramian_of(step)), rtol=1e-5, atol=1e-5)


def test_zero_gradients_leave_the_weights_where_they_were():
    assert_close(SDMGrad()(torch.zeros(2, 2)), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lam", -1.0, r"`lam` must be finite and at least 0, got -1.0"),
        ("lr", math.inf, r"`lr` must be finite .*got inf"),
        ("momentum", -0.5, r"`momentum` must be .*got -0.5"),
        ("momentum", 1.0, r"`momentum` must be in \[0, 1\), got 1.0"),
        ("iterations", 0, r"`iterations` must be .*got 0"),
        ("batches", 4, r"`batches` must be .*got 4"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        SDMGrad(**{name: value})


def test_batches_that_do_not_divide_the_groups_are_refused():
    with pytest.raises(ValueError, match=r"got 3"):
        SDMGrad(batches=2)(torch.eye(3))


@given(J=st.integers(1, 3).flatmap(full_rank), scale=SCALES)
def test_batches_that_contradict_each_other_have_a_unit_too(J, scale):
    # diag(A) < 0 throughout: A is divided by its magnitudes, so that the losses' scale makes no difference.
    scale = 2.0 ** round(math.log2(scale))
    J = torch.cat([J, -J])
    assert torch.equal(SDMGrad(batches=2)(gramian_of(J * scale)), SDMGrad(batches=2)(gramian_of(J)))
