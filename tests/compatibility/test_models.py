"""What models, precisions and loops the collectors work with: the first table in docs/compatibility.md."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch_config

from gradalign import GradientAligner
from tests.compatibility import nets, oracle
from tests.compatibility.cells import (
    COLLECTORS,
    REFUSED,
    Row,
    backward,
    expected_gradient,
    step_equals_the_oracle,
    wrapped,
)
from tests.compatibility.rows import CHECKPOINT, ROWS


@pytest.mark.parametrize("collector", COLLECTORS)
@pytest.mark.parametrize("name", ROWS)
def test_cell(name, collector):
    row = ROWS[name]
    check = row.check or step_equals_the_oracle
    with row.around():
        if row.word(collector) == REFUSED:
            error, match = row.refused[collector]
            with pytest.raises(error, match=match):
                check(row, collector)
        else:
            check(row, collector)


@pytest.mark.parametrize("kind", [nets.CheckpointedFromTheInputs, nets.CheckpointedAndTied])
@pytest.mark.parametrize("collector", [*COLLECTORS, "auto"])
def test_a_reentrant_checkpoint_that_autograd_would_pass_by(kind, collector):
    net = nets.seeded(kind)
    inside = list(net.body.parameters())
    lost = torch.autograd.grad(net.losses()["main"], inside, allow_unused=True)  # without a word
    kept = nets.seeded(kind)
    kept.losses()["main"].backward()
    assert all(
        one is None or not torch.allclose(one, p.grad) for one, p in zip(lost, kept.body.parameters(), strict=True)
    )
    optimizer = wrapped(net, collector, "ga-soft" if collector in ("streamed", "probed") else "sum")
    with pytest.raises(CHECKPOINT[0], match=CHECKPOINT[1]):
        backward(optimizer, net.losses, collector)
    assert all(p.grad is None for p in net.parameters())


def test_a_reentrant_checkpoint_in_one_group_is_named():
    net = nets.seeded(nets.CheckpointedFromTheInputs)
    other = nets.seeded(nets.Net)
    optimizer = GradientAligner(torch.optim.SGD([*net.parameters(), *other.parameters()]), "pcgrad")
    losses = {"plain": other.losses()["main"], "hidden": [other.losses()["main"], net.losses()["main"]]}
    with pytest.raises(ValueError, match=r"`losses\['hidden'\]` must not pass through reentrant"):
        optimizer.backward(losses)
    with optimizer.accumulate():
        optimizer.backward({name: other.losses()["main"] for name in losses})
        with pytest.raises(ValueError, match=r"`losses\['hidden'\]` must not pass through reentrant"):
            optimizer.backward(losses)
    optimizer.backward({name: other.losses()["main"] for name in losses})  # what waited is still there
    assert optimizer.report.names == ("plain", "hidden")


class Deep(nn.Module):
    """A chain as deep as no recursion could follow, and wide: each link is used twice."""

    def __init__(self, depth):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.depth = depth

    def loss(self):
        x = self.weight
        for _ in range(self.depth):
            x = x + 1e-9 * x
        return x.sum()


def test_a_long_graph_is_walked_once():
    net = Deep(3000)  # 2^3000 paths lead through it
    optimizer = GradientAligner(torch.optim.SGD(net.parameters(), lr=0.1), "sum")
    optimizer.backward({"a": net.loss(), "b": net.loss()})
    assert optimizer.report.norms.isfinite().all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")  # torch scripts to compile
@functorch_config.patch(enable_autograd_cache=False)  # it may hold what a plain backward compiled for itself
def test_generated_code():
    torch._dynamo.reset()
    net = nets.seeded(nets.shallow)
    net.compile()
    for collector in ("stacked", "streamed", "probed"):
        for rule in COLLECTORS[collector]:
            backward(wrapped(net, collector, rule), net.losses, collector)
            expected = expected_gradient(Row(nets.shallow), collector, rule)
            oracle.assert_same(oracle.taken(net.parameters()), expected, zeros_may_lack=collector == "probed")
