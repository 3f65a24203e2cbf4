from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from benchmarks import toy_problem
from benchmarks.toy_problem import STARTS, descend, distance, objectives, pareto_set
from gradalign import rules
from gradalign.rules.kinds import Random

DETERMINISTIC = [
    name for name in rules.names() if not isinstance(rules.get(name, **toy_problem.REQUIRED.get(name, {})), Random)
]


def fresh(name):
    return rules.get(name, **toy_problem.REQUIRED.get(name, {}))


def takes_two_groups(rule):
    try:
        rule.check_groups(2, toy_problem.NAMES)
    except ValueError:
        return False
    return True


def options(*given):
    return toy_problem.parser().parse_args(["--steps=1", *given])


def test_values_in_a_valley_in_a_bowl_and_between():
    # x = (-5 + e, large): |x1 + 7 - 2 tanh x2| = e, so f1 = log(e / 2) + 6 with tanh(x2 / 2) = 1, and f2 = log 5 + 6.
    x = torch.tensor([[-5.0 + 2e-3, 60.0], [0.0, -60.0], [3.0, 0.0]], dtype=torch.float64)
    bowl = (49 + 52**2 / 10) / 10 - 20
    expected = [[math.log(1e-3) + 6, math.log(5 - 1e-3) + 6], [bowl, bowl], [0.0, 0.0]]
    # -5 + 0.002 has lost four digits of the 0.002.
    assert_close(objectives(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11)


def test_the_logarithm_is_cut_off_in_the_valley():
    x = torch.tensor([5.0, 60.0], dtype=torch.float64)
    assert_close(objectives(x)[1], torch.tensor(math.log(5e-6) + 6, dtype=torch.float64))


def test_swapping_the_losses_mirrors_the_plane():
    x = 8 * torch.randn(50, 2, dtype=torch.float64)
    assert_close(objectives(x * torch.tensor([-1.0, 1.0])), objectives(x).flip(-1))


def test_slopes_are_those_of_finite_differences():
    x = torch.tensor(STARTS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(objectives, (x,))


def test_no_point_of_a_grid_beats_the_front():
    front = objectives(pareto_set(201))
    # In steps of 0.05 over the plane, and of 0.005 where the front is.
    wide = torch.cartesian_prod(*[torch.linspace(-12, 12, 481, dtype=torch.float64)] * 2)
    near = torch.cartesian_prod(torch.linspace(-7.2, 7.2, 721), torch.linspace(-8.6, -8.2, 81)).double()
    # A point beats the front where both losses are lower, by more than rounding.
    for grid in (wide, near):
        values = objectives(grid)
        assert not (values[:, None] < front - 1e-9).all(-1).any()


def test_the_front_is_a_falling_curve_and_holds_both_minima():
    front = objectives(pareto_set(201))
    assert (front[:, 0].diff() < 0).all()
    assert (front[:, 1].diff() > 0).all()
    grid = torch.cartesian_prod(*[torch.linspace(-12, 12, 481, dtype=torch.float64)] * 2)
    best = torch.stack([front[-1, 0], front[0, 1]])
    assert (objectives(grid).amin(0) >= best).all()
    # The grid holds a point within 0.025 of each minimum, where the loss is flat: c'' is below 0.05 there.
    assert_close(objectives(grid).amin(0), best, rtol=0, atol=1e-4)


def test_distance_is_zero_on_the_front_and_euclidean_off_it():
    front = objectives(pareto_set())
    assert_close(distance(front[::50], front), torch.zeros(41, dtype=torch.float64))
    # Between its points the front bends by less than edge squared / 8 radii: 0.02**2 / 8 / 20.
    between = objectives(pareto_set(4001)[1::2])
    assert distance(between, front).max() < 1e-5
    corner = torch.tensor([[0.0, 0.0], [0.0, 2.0], [2.0, 2.0]], dtype=torch.float64)
    points = torch.tensor([[-3.0, 1.0], [5.0, 6.0], [1.0, 1.5], [0.0, -2.0]], dtype=torch.float64)
    assert_close(distance(points, corner), torch.tensor([3.0, 5.0, 0.5, 2.0], dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if takes_two_groups(fresh(name))])
def test_all_starts_at_once_are_each_start_alone(name):
    together = descend(fresh(name), STARTS, steps=12)
    alone = torch.cat([descend(fresh(name), [start], steps=12) for start in STARTS], dim=1)
    assert together.shape == (2, 5, 2)
    assert_close(together, alone)


def test_the_path_is_recorded_every_hundredth_step_and_at_the_end():
    path = descend(rules.Sum(), STARTS, steps=150)
    assert path.shape == (3, 5, 2)
    assert_close(path[0], torch.tensor(STARTS, dtype=torch.float64))
    assert_close(path[1], descend(rules.Sum(), STARTS, steps=100)[-1])


def test_sum_is_plain_adam():
    x = torch.nn.Parameter(torch.tensor(STARTS[1], dtype=torch.float64))
    plain = torch.optim.Adam([x], lr=1e-3)
    for _ in range(20):
        plain.zero_grad()
        objectives(x).sum().backward()
        plain.step()
    assert_close(descend(rules.Sum(), [STARTS[1]], steps=20, learning_rate=1e-3)[-1, 0], x.detach())


def test_a_rule_that_takes_more_groups_says_so():
    result = toy_problem.outcome("krum", objectives(pareto_set()), options())
    assert "loss groups, got 2" in result["not run"]
    assert toy_problem.line("krum", result).startswith("krum ")


def test_an_outcome_tells_who_reached_the_front(tmp_path):
    result = toy_problem.outcome("sum", objectives(pareto_set()), options(f"--figures={tmp_path}"))
    assert result["reached"] == [False] * 5
    assert (tmp_path / "sum-toy.png").stat().st_size > 1000
    assert "*" not in toy_problem.line("sum", result)
    assert toy_problem.line("sum", result | {"reached": [True] * 5}).count("*") == 5
