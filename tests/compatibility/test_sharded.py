"""Reentrant checkpoints in a sharded model: refused elsewhere, they work where loss.backward() makes the gradients."""

from __future__ import annotations

from functools import partial

import pytest
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.compatibility import nets, oracle
from tests.compatibility.cells import wrapped


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", [partial(nets.Checkpointed, reentrant=True), nets.CheckpointedFromTheInputs])
@pytest.mark.parametrize("rule", ["sum", "pcgrad"])
def test_reentrant_checkpoints(mesh, kind, rule):
    net, reference = nets.seeded(kind), nets.seeded(kind)
    fully_shard(net, mesh=mesh)
    wrapped(net, "stacked", rule).backward(net.losses())
    rows = []
    for name in ("main", "against"):  # by backward: this is what torch.autograd.grad does not see
        reference.losses()[name].backward()
        rows.append(oracle.taken(reference.parameters()))
    actual = [None if p.grad is None else p.grad.to_local() for p in net.parameters()]
    oracle.assert_same(actual, oracle.combined(rule, rows))
    assert all(p.grad is not None for p in net.body.parameters())


def test_parameters_that_are_not_sharded_are_refused_as_ever(mesh):
    net = nets.seeded(nets.CheckpointedFromTheInputs)
    with pytest.raises(ValueError, match=r"`losses\['main'\]` must not pass through reentrant"):
        wrapped(net, "stacked", "sum").backward(net.losses())
    assert all(p.grad is None for p in net.parameters())
