"""Ranks whose aligners are made otherwise, or called otherwise: named on all; and what may differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from gradalign import GradientAligner, rules
from tests.distributed import processes
from tests.distributed.small import Net


def refuse(gradient):
    raise ValueError("mine alone")


def out_of_step(rank, size):
    messages = {}
    model = Net()
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "pcgrad", update_every=2 - rank)
    optimizer.backward(model.losses(rank))
    messages["update_every"] = refused(optimizer, model.losses(rank))
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "pcgrad")
    if rank == 0:
        with optimizer.accumulate():
            optimizer.backward(model.losses(rank))
    messages["micro-batches"] = refused(optimizer, model.losses(rank))
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "pcgrad")
    scaler = torch.amp.GradScaler("cpu") if rank == 0 else None
    messages["scaler"] = refused(optimizer, model.losses(rank), scaler=scaler)
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "ga-soft")
    messages["probe"] = refused(
        optimizer,
        {"a": model.losses(rank)["a"]},
        probe=lambda: {"b" if rank == 0 else "c": model.losses(rank)["b"]},
        match="must hold the same loss groups",
    )
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "upgrad" if rank else "pcgrad")
    messages["rule"] = refused(optimizer, model.losses(rank))
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "pcgrad")
    with optimizer.accumulate():
        optimizer.backward(model.losses(rank))
        if rank == 1:  # the second micro-batch loses the first here; there it is dropped
            losses = model.losses(rank)
            losses["b"].register_hook(refuse)
            with pytest.raises(ValueError, match="mine alone"):
                optimizer.backward(losses)
    if rank == 0:
        optimizer.zero_grad()
    messages["lost"] = refused(optimizer, model.losses(rank))
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "pcgrad", scope=("all", "shared")[rank])
    messages["scope"] = refused(optimizer, model.losses(rank))
    kinds = ("skip", "propagate")
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "pcgrad", nonfinite=kinds[rank])
    messages["nonfinite"] = refused(optimizer, model.losses(rank))
    granularity = "tensor" if rank else "global"
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "pcgrad", granularity=granularity)
    messages["granularity"] = refused(optimizer, model.losses(rank), match="must hold the same parameters")
    return messages


def refused(optimizer, losses, match="must go on alike on all ranks", **options):
    with pytest.raises(ValueError, match=match) as caught:
        optimizer.backward(losses, **options)
    return str(caught.value)


def test_ranks_that_are_out_of_step_are_named(tmp_path):
    for messages in processes.run(out_of_step, 2, folder=tmp_path):
        rule = "PCGrad(seed=0)"
        assert f"{rule}, kept on rank 0; {rule}, stacked on rank 1" in messages["update_every"]
        assert f"{rule}, stacked, micro-batch 2 on rank 0; {rule}, stacked on rank 1" in messages["micro-batches"]
        assert f"{rule}, stacked, scaled on rank 0; {rule}, stacked on rank 1" in messages["scaler"]
        assert f"{rule}, stacked on rank 0; {rule}, stacked, after a lost micro-batch on rank 1" in messages["lost"]
        assert f"{rule}, stacked on rank 0; {rule}, stacked, scope='shared' on rank 1" in messages["scope"]
        assert f"{rule}, stacked, nonfinite='skip' on rank 0" in messages["nonfinite"]
        assert f"{rule}, stacked on rank 0; UPGrad" in messages["rule"]
        assert "in the same blocks, got others on ranks [1] than on [0]" in messages["granularity"]
        assert "['b'] on rank 0; ['c'] on rank 1" in messages["probe"]


class Halves(rules.Rule):
    """A rule of a user's own, whose repr holds its address, as any object's does."""

    name = "halves"

    def _weights(self, G, names):
        return torch.full_like(G[..., 0], 0.5)


@dataclass(frozen=True, eq=False)
class Called(Halves):
    """One with a setting that is another object on each rank."""

    scale: Callable = field(default_factory=lambda: lambda: 1.0)
    power: float = 2.0
    powers: list = field(default_factory=lambda: [1, 2])


def own_rules(rank, size):
    seen = {}
    for name, rule in (("plain", Halves()), ("callable", Called())):
        model = Net()
        optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule)
        optimizer.backward(model.losses(rank))
        seen[name] = optimizer.report.weights
    model = Net()
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), Called(power=2.0 + rank))
    seen["other settings"] = refused(optimizer, model.losses(rank))
    return seen


def test_a_rule_of_ones_own_trains_on_ranks(tmp_path):
    for seen in processes.run(own_rules, 2, folder=tmp_path):
        assert seen["plain"].tolist() == seen["callable"].tolist() == [0.5, 0.5, 0.5]
        assert (
            "Called(power=2.0, powers=[1, 2]), stacked on rank 0; Called(power=3.0, powers=" in seen["other settings"]
        )


def frozen(rank, size):
    seen = {}
    model = Net()
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "pcgrad")
    model.requires_grad_(rank != 1)
    try:
        optimizer.backward(model.losses(rank) if rank != 1 else {"a": torch.zeros((), requires_grad=True)})
    except (RuntimeError, ValueError) as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    model.requires_grad_(True)
    optimizer.backward(model.losses(rank))
    seen["weights"] = optimizer.report.weights
    return seen


def test_a_rank_whose_parameters_are_all_frozen_is_named_and_all_go_on(tmp_path):
    healthy, broken = processes.run(frozen, 2, folder=tmp_path)
    assert healthy["error"].startswith("GradAlignError: backward() must succeed on all ranks, got an error on [1]")
    assert broken["error"].startswith("ValueError")
    assert healthy["weights"].tolist() == broken["weights"].tolist()
