"""What goes over the wire, when it does, and what happens when the ranks do not agree."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import nn

from gradalign import GradientAligner, rules
from tests.distributed import processes

WIDTH = 400  # a square matrix of it travels alone
K = 3

# On a ring an all-reduce is a reduce-scatter and an all-gather: twice the bytes of either.
PRICES = {"all_reduce": 2, "reduce_scatter_tensor": 1, "all_gather_into_tensor": 1}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, K)

    def losses(self, rank, names=("a", "b", "c")):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(rank))
        outputs = self.head(self.body(x))
        return {name: outputs[:, k].square().mean() for k, name in enumerate(names)}


class Wire:
    """Record what is exchanged: its price in bytes, and the order of events."""

    def __init__(self):
        self.bytes, self.events = 0, []
        for name, price in PRICES.items():
            setattr(dist, name, self._counted(name, price, getattr(dist, name)))

    def _counted(self, name, price, call):
        def counted(*arguments, **options):
            tensor = arguments[1] if name == "reduce_scatter_tensor" else arguments[0]
            self.bytes += price * tensor.nbytes
            work = call(*arguments, **options)
            if not options.get("async_op"):
                return work
            self.events.append(f"{name} begins")
            waiting = work.wait

            def wait():
                self.events.append(f"{name} is waited for")
                return waiting()

            return SimpleNamespace(wait=wait)

        return counted


def count(rank, size, cases):
    """The bytes of a second step and P in bytes, for each rule, its options, and whether there is a probe."""
    counted = {}
    wire = Wire()
    for name, (rule, options, probing) in cases.items():
        model = Net()
        optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule, **options)
        for _ in range(2):
            wire.bytes, wire.events = 0, []
            optimizer.zero_grad()
            losses = model.losses(rank)
            if probing:
                anchor = {"a": losses["a"]}
                optimizer.backward(anchor, probe=lambda: {"b": model.losses(rank)["b"], "c": model.losses(rank)["c"]})  # noqa: B023
            else:
                for key, loss in losses.items():
                    loss.register_hook(lambda gradient, key=key: wire.events.append(f"backward of {key}"))
                optimizer.backward(losses)
        P = sum(p.nbytes for p in model.parameters())
        counted[name] = {"bytes": wire.bytes, "P": P, "events": wire.events}
    return counted


CASES = {
    "stacked": ("pcgrad", {}, False),
    "streamed": ("ga-soft", {}, False),
    "probed": ("ga-soft", {}, True),
    "kept": ("pcgrad", {"update_every": 2}, False),
}
SMALL = 4096  # of masks, names, Gramians and padding


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return processes.run(count, 2, CASES, folder=tmp_path_factory.mktemp("ranks"))[0]


@pytest.mark.parametrize(("name", "price"), [("stacked", K + 1), ("streamed", 2), ("probed", 2), ("kept", 2)])
def test_bytes_on_the_wire(counted, name, price):
    # An all-reduce of the gradient, which is what joint training sends, is 2 P.
    figures = counted[name]
    assert price * figures["P"] <= figures["bytes"] <= price * figures["P"] + SMALL


def test_a_row_is_on_its_way_while_the_next_backward_runs(counted):
    events = counted["stacked"]["events"]
    begins, waits = "reduce_scatter_tensor begins", "reduce_scatter_tensor is waited for"
    assert events == ["backward of a", begins, "backward of b", begins, "backward of c", begins, waits, waits, waits]


def test_the_anchor_is_on_its_way_while_an_auxiliary_s_backward_runs(counted):
    events = counted["streamed"]["events"]
    assert events[:2] == ["backward of a", "all_reduce begins"]
    begun = [n for n, event in enumerate(events) if event == "all_reduce begins"]
    waited = [n for n, event in enumerate(events) if event == "all_reduce is waited for"]
    assert max(begun) < events.index("backward of b") < min(waited)
    assert len(begun) == len(waited)


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
        assert (
            "['a', 'c'] (stacked) on rank 0; ['a', 'b'] (stacked) on rank 1; ['a', 'c'] (stacked) on rank 2"
            in outcome["message"]
        )
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
        except FloatingPointError:
            raise
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


def alone(rank, size):
    torch.manual_seed(0)
    shared, p, q = (nn.Parameter(torch.randn(300, 300, dtype=torch.float64)) for _ in range(3))
    kept = []
    p.register_hook(lambda gradient: kept.append((gradient, gradient.clone())))
    optimizer = GradientAligner(torch.optim.SGD([shared, p, q], lr=0.1), "ga-soft", scope="shared")
    c = torch.randn(300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    losses = {"a": (shared * c).mean(), "b": (shared.square() * c).mean() + ((p + q) * c).mean()}
    optimizer.backward(losses)  # p and q get one tensor
    return {"p": p.grad, "q": q.grad, "c": c, "unchanged": all(torch.equal(a, b) for a, b in kept)}


def test_what_one_auxiliary_alone_reaches_is_averaged_in_memory_of_its_own(tmp_path):
    outcomes = processes.run(alone, 2, folder=tmp_path)
    expected = 0.3 * sum(outcome["c"] for outcome in outcomes) / 2 / 300**2
    for outcome in outcomes:
        assert outcome["unchanged"]
        for gradient in (outcome["p"], outcome["q"]):
            torch.testing.assert_close(gradient, expected)


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


def in_pairs(rank, size):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    gradients = {}
    for name, group in (("pairs", pairs[rank // 2]), ("alone", None)):
        model = Net()
        optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rules.UPGrad(), process_group=group)
        optimizer.backward(model.losses(rank))
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    return gradients


def reference(*ranks):
    model = Net()
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rules.UPGrad())
    of_ranks = [model.losses(rank) for rank in ranks]
    optimizer.backward({name: sum(losses[name] for losses in of_ranks) / len(of_ranks) for name in of_ranks[0]})
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_a_process_group_of_some_ranks_and_none_at_all(tmp_path):
    for rank, gradients in enumerate(processes.run(in_pairs, 4, folder=tmp_path)):
        for name, expected in (("pairs", reference(rank // 2 * 2, rank // 2 * 2 + 1)), ("alone", reference(rank))):
            assert (gradients[name] - expected).norm() < 1e-6 * expected.norm()
