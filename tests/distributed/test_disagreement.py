"""Ranks that do not agree, and errors on one of them: named on all, and none is left waiting."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
from torch import nn

from gradalign import GradientAligner
from gradalign.collectors.agreement import telling
from tests.distributed import processes
from tests.distributed.small import WIDTH, Net


def other_names(rank, size):
    model = Net()
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "sum")
    names = ("a", "b") if rank == 1 else ("a", "c")
    with pytest.raises(ValueError, match="same loss groups") as caught:
        optimizer.backward(model.losses(rank, names))
    untouched = all(p.grad is None for p in model.parameters())
    optimizer.backward(model.losses(rank))  # it goes on
    return {"message": str(caught.value), "untouched": untouched}


def test_ranks_with_other_groups_are_named(tmp_path):
    for outcome in processes.run(other_names, 3, folder=tmp_path):
        assert outcome["untouched"]
        assert "['a', 'c'] on rank 0; ['a', 'b'] on rank 1; ['a', 'c'] on rank 2" in outcome["message"]
        assert "pass a zero" in outcome["message"]


def broken_on_one(rank, size):
    seen = {}
    for name, rule, nonfinite in (("raise", "pcgrad", "raise"), ("skip", "ga-soft", "skip")):
        model = Net()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule, nonfinite=nonfinite)
        losses = model.losses(rank)
        if rank == 1:
            losses["b"] = losses["b"] * torch.nan
        try:
            optimizer.backward(losses)
            optimizer.step()
            seen[name] = optimizer.skipped_steps
        except RuntimeError as error:
            seen[name] = str(error)
        seen[f"{name} stayed"] = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return seen


def test_what_is_not_finite_on_one_rank_is_seen_by_all(tmp_path):
    for seen in processes.run(broken_on_one, 2, folder=tmp_path):
        assert "loss group 'b' must be finite" in seen["raise"]
        assert seen["skip"] == 1
        assert seen["raise stayed"]
        assert seen["skip stayed"]


def other_parameters(rank, size):
    model = Net()
    model.body[0 if rank == 0 else 2].requires_grad_(False)  # of the same shapes
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "sum")
    with pytest.raises(ValueError, match=r"others on ranks \[1\] than on \[0\]"):
        optimizer.backward(model.losses(rank))
    return {"untouched": all(p.grad is None for p in model.parameters())}


def test_ranks_with_other_frozen_parameters_are_named(tmp_path):
    for outcome in processes.run(other_parameters, 2, folder=tmp_path):
        assert outcome.get("untouched"), outcome


def overflows(rank, size):
    model = Net()
    head = nn.Linear(WIDTH, 1)  # reached by the auxiliary alone
    optimizer = GradientAligner(torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1), "ga-soft")
    losses = model.losses(rank, ("a", "b"))
    losses["b"] = losses["b"] + (1e36 * head.weight.sum() if rank == 1 else 0.0 * head.weight.sum())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer.backward(losses, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    return {"scale": scaler.get_scale()}


def test_an_overflow_of_an_auxiliary_on_one_rank_lowers_the_scale_on_all(tmp_path):
    assert processes.run(overflows, 2, folder=tmp_path) == [{"scale": 2.0**11}] * 2


def dies(rank, size):
    model = Net()
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "pcgrad")
    optimizer.backward(model.losses(rank))
    if rank == 1:
        os._exit(1)
    optimizer.zero_grad()
    optimizer.backward(model.losses(rank))
    return {}


def test_a_rank_that_dies_gives_the_others_an_error(tmp_path):
    alive, dead = processes.run(dies, 2, folder=tmp_path, timeout=timedelta(seconds=10))
    assert dead is None
    assert alive["raised"] in ("RuntimeError", "DistBackendError", "DistNetworkError")


def averaged(model, losses_of_ranks):
    """The gradients of the mean of all ranks' losses, by plain autograd: of each group, the parameters' in one."""
    names = losses_of_ranks[0].keys()
    means = {name: sum(losses[name] for losses in losses_of_ranks) / len(losses_of_ranks) for name in names}
    return {
        name: torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    loss, list(model.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
                )
            ]
        )
        for name, loss in means.items()
    }


def reaches_nothing_here(rank, size):
    outcome = {}
    for name, rule, group in (("stacked", "sum", "b"), ("streamed", "ga-soft", "b"), ("anchor", "ga-soft", "a")):
        model = Net()
        optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule)
        losses = model.losses(rank, ("a", "b"))
        if rank == 1:
            losses[group] = torch.zeros((), requires_grad=True) * 1.0
        optimizer.backward(losses)
        outcome[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    model = Net()
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "ga-soft")
    losses = model.losses(rank, ("a", "b"))
    anchor = losses["a"] if rank == 0 else torch.zeros((), requires_grad=True) * 1.0
    optimizer.backward({"a": anchor}, probe=lambda: {"b": model.losses(rank, ("a", "b"))["b"]})
    outcome["probed"] = torch.cat([p.grad.flatten() for p in model.parameters()])
    return outcome


def ga_soft(a, b, alpha=0.3):
    return ((1 - alpha) + alpha * (a @ b) / (a @ a)) * a


def test_a_group_may_reach_nothing_on_one_rank(tmp_path):
    model = Net()
    zero = 0.0 * model.head.bias.sum()
    first, second = model.losses(0, ("a", "b")), model.losses(1, ("a", "b"))
    without_b = averaged(model, [first, {**second, "b": zero}])
    without_a = averaged(model, [first, {**second, "a": zero}])
    expected = {
        "stacked": without_b["a"] + without_b["b"],
        "streamed": ga_soft(without_b["a"], without_b["b"]),
        "anchor": ga_soft(without_a["a"], without_a["b"]),
        "probed": ga_soft(without_a["a"], without_a["b"]),
    }
    for outcome in processes.run(reaches_nothing_here, 2, folder=tmp_path):
        for name, gradient in expected.items():
            assert (outcome[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def failing(rank, size):
    """Let rank 1 meet an error of its own in every place there is; all ranks then go on."""
    outcome = {}
    for name, rule, probing in (("stacked", "sum", False), ("streamed", "ga-soft", False), ("probed", "ga-soft", True)):
        for place in ("hook", "target", "nowhere"):
            model = Net()
            optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule)
            losses = model.losses(rank, ("a", "b"))
            if rank == 1 and place == "hook":
                losses["a" if probing else "b"].register_hook(refuse)
            if rank == 1 and place == "target":
                model.head.bias.grad = torch.zeros(()).expand(model.head.bias.shape)
            error = ""
            try:
                if probing:
                    second = losses["b"] if place == "nowhere" and rank == 1 else None  # no forward of its own
                    optimizer.backward(
                        {"a": losses["a"]},
                        probe=lambda: {"b": second if second is not None else model.losses(rank, ("a", "b"))["b"]},  # noqa: B023
                    )
                else:
                    if place == "nowhere":
                        losses = {key: loss.detach().requires_grad_() * 1.0 for key, loss in losses.items()}
                    optimizer.backward(losses)
            except (RuntimeError, ValueError) as caught:
                error = f"{type(caught).__name__}: {caught}"
            others = [p for p in model.parameters() if p is not model.head.bias]
            written = any(p.grad is not None for p in others)
            model.head.bias.grad = None
            optimizer.backward(model.losses(rank, ("a", "b")))
            outcome[f"{name}, {place}"] = {"error": error, "written": written}
    return outcome


def refuse(gradient):
    raise ValueError("mine alone")


def test_an_error_on_one_rank_is_told_to_the_others_and_all_go_on(tmp_path):
    healthy, broken = processes.run(failing, 2, folder=tmp_path)
    assert "raised" not in healthy, healthy
    for name, seen in healthy.items():
        assert not seen["written"]
        assert not broken[name]["written"]
        if name in ("stacked, nowhere", "streamed, nowhere"):
            assert "must reach a parameter" in seen["error"]
            assert "must reach a parameter" in broken[name]["error"]
        elif name == "probed, nowhere":
            assert "got an error on [1]" in seen["error"]
            assert "must compute its losses within its call" in broken[name]["error"]
        else:
            assert seen["error"].startswith("GradAlignError: backward() must succeed on all ranks, got an error on [1]")
            assert ("mine alone" if name.endswith("hook") else "`p.grad` must be") in broken[name]["error"]


def early(rank, size):
    """Errors on rank 1 before anything is differentiated."""
    outcome = {}
    for name in ("no graph", "names the anchor", "probe on one rank", "no tensor"):
        model = Net()
        optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "ga-soft")
        losses, options = model.losses(rank, ("a", "b")), {}
        if name in ("names the anchor", "probe on one rank") and (rank == 1 or name == "names the anchor"):
            key = "a" if rank == 1 and name == "names the anchor" else "b"
            options["probe"] = lambda key=key, model=model: {key: model.losses(rank, ("a", "b"))["b"]}
            losses = {"a": losses["a"]}
        if rank == 1 and name in ("no graph", "no tensor"):
            losses["b"] = losses["b"].detach() if name == "no graph" else 1.0
        try:
            optimizer.backward(losses, **options)
            outcome[name] = ""
        except (RuntimeError, ValueError, TypeError) as error:
            outcome[name] = f"{type(error).__name__}: {error}"
        outcome[f"{name}, then"] = all(p.grad is None for p in model.parameters())
        optimizer.backward(model.losses(rank, ("a", "b")))
    return outcome


def test_errors_before_anything_is_differentiated_are_told(tmp_path):
    healthy, broken = processes.run(early, 2, folder=tmp_path)
    assert "raised" not in healthy, healthy
    for name in ("no graph", "names the anchor", "no tensor"):
        assert healthy[name].startswith("GradAlignError: backward() must succeed on all ranks, got an error on [1]")
        assert healthy[f"{name}, then"]
    assert "must have a graph" in broken["no graph"]
    assert "must not name the anchor" in broken["names the anchor"]
    assert "`losses['b']` must be" in broken["no tensor"]
    for seen in (healthy, broken):
        assert "must hold the same loss groups" in seen["probe on one rank"]


@pytest.mark.parametrize(("error", "told"), [(ValueError, True), (KeyboardInterrupt, False)])
def test_errors_are_told_and_interrupts_are_not(error, told):
    """An interrupt can come amid an exchange, where another would mix with it; torchrun interrupts all ranks."""
    said = []
    with pytest.raises(error, match=r"^mine$"), telling(lambda: said.append(True)):
        raise error("mine")
    assert bool(said) == told
