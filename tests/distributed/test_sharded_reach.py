"""Sharded parameters beside plain ones that each rank reaches as it likes, and what becomes of errors and skips."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gradalign import GradientAligner
from tests.distributed import processes


class Heads(nn.Module):
    """A body that is sharded, and two plain heads of the same shape: each rank reaches one of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
        self.heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.double()

    def losses(self, step, rank):
        x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))
        hidden = self.body(x)
        return {"a": hidden.square().mean(), "b": (self.heads[rank](hidden) - 1).abs().mean() + hidden.mean()}


CASES = {
    "sum": ("sum", {}),
    "pcgrad": ("pcgrad", {}),
    "ga-soft, shared": ("ga-soft", {"scope": "shared"}),
    "pcgrad, shared": ("pcgrad", {"scope": "shared", "granularity": "tensor"}),
    "ga-soft, every other": ("ga-soft", {"update_every": 2}),
    "this mesh alone": ("pcgrad", {"process_group": None}),
}


def train(model, rule, options, ranks):
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer = GradientAligner(inner, rule, **options)
    grads = []
    for step in range(4):
        optimizer.zero_grad()
        of_ranks = [model.losses(step, rank) for rank in ranks]
        optimizer.backward({key: sum(losses[key] for losses in of_ranks) / len(of_ranks) for key in ("a", "b")})
        grads.append([None if p.grad is None else whole(p.grad).clone() for p in model.parameters()])
        optimizer.step()
    return {"gradients": grads, "parameters": [whole(p.detach()).clone() for p in model.parameters()]}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train_all(rank, size):
    outcomes = {}
    for name, (rule, options) in CASES.items():
        model = Heads()
        fully_shard(model.body)
        outcomes[name] = train(model, rule, options, [rank])
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return processes.run(train_all, 2, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_ranks_that_reach_different_plain_parameters_equal_one_process(outcomes, name):
    rule, options = CASES[name]
    reference = train(Heads(), rule, options, [0, 1])
    for outcome in outcomes:
        assert "raised" not in outcome, outcome
        for here, there in zip(outcome[name]["gradients"], reference["gradients"], strict=True):
            for ours, theirs in zip(here, there, strict=True):
                assert (ours is None) == (theirs is None)
                assert ours is None or torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
        for ours, theirs in zip(outcome[name]["parameters"], reference["parameters"], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-9)


class Branches(nn.Module):
    """Two blocks, the second of which the rows of the first half alone reach."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in range(2)
        ).double()

    def losses(self, step, half):
        x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + half))
        first = self.run(0, x)
        second = self.run(1, first) if half == 0 else first
        return {"a": first.square().mean(), "b": (second - 1).abs().mean()}

    def run(self, block, x):
        return self.blocks[block]["down"](torch.tanh(self.blocks[block]["up"](x)))


def train_branches(rank, size):
    model = Branches()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for layer in model.blocks[0].values():
        fully_shard(layer, mesh=mesh["data"])
    return train(model, "pcgrad", {}, [rank // 2])


def test_a_block_cut_over_some_ranks_that_others_alone_reach_equals_one_process(tmp_path):
    """The half that does not reach the block has zeros of its own parts to average."""
    reference = train(Branches(), "pcgrad", {}, [0, 1])
    for outcome in processes.run(train_branches, 4, folder=tmp_path):
        assert "raised" not in outcome, outcome
        for here, there in zip(outcome["gradients"], reference["gradients"], strict=True):
            for ours, theirs in zip(here, there, strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
        for ours, theirs in zip(outcome["parameters"], reference["parameters"], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-9)


def disagreeing(rank, size):
    model = Heads()
    fully_shard(model.body)
    outcome = {}
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "sum", process_group=None)

    def caught(losses):
        try:
            optimizer.backward(losses)
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    losses = model.losses(0, rank)
    outcome["names"] = caught(dict(reversed(losses.items())) if rank else losses)
    if rank == 1:
        model.heads[0].bias.grad = torch.zeros((), dtype=torch.float64).expand(4)
    outcome["target"] = caught(model.losses(0, rank))
    model.heads[0].bias.grad = None
    losses = model.losses(0, rank)
    with optimizer.accumulate():  # sharded ranks exchange something at every micro-batch
        outcome["micro-batch"] = caught({"a": losses["a"]} if rank else losses)
    outcome["untouched"] = all(p.grad is None for p in model.parameters())
    optimizer.backward(model.losses(0, rank))
    return outcome


def test_errors_are_told_over_the_mesh(tmp_path):
    healthy, broken = processes.run(disagreeing, 2, folder=tmp_path)
    assert "raised" not in healthy, healthy
    for seen in (healthy, broken):
        assert "['a', 'b'] on rank 0; ['b', 'a'] on rank 1" in seen["names"]
        assert "['a', 'b'] on rank 0; ['a'] on rank 1" in seen["micro-batch"]
        assert seen["untouched"]
    assert healthy["target"].startswith("GradAlignError: backward() must succeed on all ranks, got an error on [1]")
    assert "`p.grad` must be None or a dense tensor" in broken["target"]


def reaching_nothing(rank, size):
    model = Heads()
    fully_shard(model.body)
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "sum")
    losses = {"a": model.losses(0, rank)["a"]}
    losses["b"] = model.heads[0].weight.square().sum() if rank == 0 else torch.zeros((), requires_grad=True) * 1.0
    optimizer.backward(losses)
    return {"head": model.heads[0].weight.grad, "half": model.heads[0].weight.detach()}


def test_a_group_may_reach_nothing_on_one_rank(tmp_path):
    for outcome in processes.run(reaching_nothing, 2, folder=tmp_path):
        assert torch.allclose(outcome["head"], outcome["half"])  # 2 w and 0, averaged


def skipping(rank, size):
    model = Heads()
    fully_shard(model.body)
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "sum", nonfinite="skip")
    before = [whole(p.detach()).clone() for p in model.parameters()]
    for factor in (1.0, torch.nan, 1.0):  # without zero_grad: the broken one is part of this step
        losses = model.losses(0, rank)
        optimizer.backward({"a": losses["a"] * factor, "b": losses["b"]})
    optimizer.step()
    after = [whole(p.detach()) for p in model.parameters()]
    return {"skipped": optimizer.skipped_steps, "stayed": all(map(torch.equal, before, after))}


def test_a_broken_group_leaves_the_step_out(tmp_path):
    assert processes.run(skipping, 2, folder=tmp_path) == [{"skipped": 1, "stayed": True}] * 2
