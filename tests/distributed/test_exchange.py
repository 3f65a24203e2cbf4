"""What goes over the wire, and when it does."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import nn

from gradalign import GradientAligner, distributed
from tests.distributed import processes
from tests.distributed.small import Net

K = 3

# On a ring an all-reduce is a reduce-scatter and an all-gather: twice the bytes of either.
PRICES = {"all_reduce": 2, "_reduce_scatter": 1, "_all_gather": 1}


class Wire:
    """Record what is exchanged: its price in bytes, and the order of events."""

    def __init__(self):
        self.bytes, self.events = 0, []
        for name, price in PRICES.items():
            home = distributed if name.startswith("_") else dist
            setattr(home, name, self._counted(name, price, getattr(home, name)))

    def _counted(self, name, price, call):
        def counted(*arguments, **options):
            tensor = arguments[1] if name == "_reduce_scatter" else arguments[0]
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
    begins, waits = "_reduce_scatter begins", "_reduce_scatter is waited for"
    assert events == ["backward of a", begins, "backward of b", begins, "backward of c", begins, waits, waits, waits]


def test_the_anchor_is_on_its_way_while_an_auxiliary_s_backward_runs(counted):
    events = counted["streamed"]["events"]
    assert events[:2] == ["backward of a", "all_reduce begins"]
    begun = [n for n, event in enumerate(events) if event == "all_reduce begins"]
    waited = [n for n, event in enumerate(events) if event == "all_reduce is waited for"]
    assert max(begun) < events.index("backward of b") < min(waited)
    assert len(begun) == len(waited)


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


def in_pairs(rank, size):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    gradients = {}
    for name, group in (("pairs", pairs[rank // 2]), ("alone", None)):
        for rule in RULES:
            model = Net()
            inner = torch.optim.SGD(model.parameters(), lr=0.1)
            model, optimizer = copy.deepcopy((model, GradientAligner(inner, rule, process_group=group)))
            optimizer.backward(model.losses(rank))
            gradients[f"{name}, {rule}"] = torch.cat([p.grad.flatten() for p in model.parameters()])
    with pytest.raises(TypeError, match="`process_group` must be 'auto' or None for an aligner to be pickled"):
        pickle.dumps(GradientAligner(inner, rule, process_group=pairs[rank // 2]))
    with pytest.raises(ValueError, match="one that this rank is a member of"):
        GradientAligner(inner, rule, process_group=pairs[1 - rank // 2])
    pickle.loads(pickle.dumps(optimizer))
    return gradients


RULES = ("upgrad", "ga-soft")


def reference(rule, *ranks):
    model = Net()
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule)
    of_ranks = [model.losses(rank) for rank in ranks]
    optimizer.backward({name: sum(losses[name] for losses in of_ranks) / len(of_ranks) for name in of_ranks[0]})
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_a_process_group_of_some_ranks_and_none_at_all(tmp_path):
    for rank, gradients in enumerate(processes.run(in_pairs, 4, folder=tmp_path)):
        for name, ranks in (("pairs", (rank // 2 * 2, rank // 2 * 2 + 1)), ("alone", (rank,))):
            for rule in RULES:
                expected = reference(rule, *ranks)
                assert (gradients[f"{name}, {rule}"] - expected).norm() < 1e-6 * expected.norm()


def large_table(rank, size):
    """A table whose gradients are row-sparse on each rank, and touch other rows on the average."""
    gradients = {}
    ranks = [rank] if size > 1 else [0, 1]
    for name, rule in (("stacked", "pcgrad"), ("streamed", "ga-soft"), ("probed", "ga-soft")):
        torch.manual_seed(2)
        table, head = nn.Embedding(5000, 256), nn.Linear(256, 2)
        optimizer = GradientAligner(torch.optim.SGD([*table.parameters(), *head.parameters()], lr=0.1), rule)
        for step in range(2):  # the second touches other rows

            def losses(key, table=table, head=head, step=step):
                return {key: sum(table_losses(table, head, step, one)[key] for one in ranks) / len(ranks)}

            optimizer.zero_grad()
            if name == "probed":
                optimizer.backward(losses("a"), probe=lambda losses=losses: losses("b"))
            else:
                optimizer.backward(losses("a") | losses("b"))
            gradients[f"{name} {step}"] = torch.cat([table.weight.grad.flatten(), head.weight.grad.flatten()])
    return gradients


def table_losses(table, head, step, rank):
    first, second = head(table(torch.arange(8) + 100 * rank + 1000 * step)).unbind(-1)
    return {"a": first.square().mean(), "b": (second - first - 1).square().mean()}


def test_row_sparse_gradients_of_each_rank(tmp_path):
    expected = large_table(0, 1)
    for gradients in processes.run(large_table, 2, folder=tmp_path):
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).norm() < 1e-6 * expected[name].norm(), name
