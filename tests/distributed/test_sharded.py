"""Sharded parameters: FSDP2, hybrid sharding, tensor parallelism, and mixtures, against one process."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from gradalign import GradientAligner, rules
from tests.distributed import processes

BATCH, STEPS = 4, 3


class Block(nn.Module):
    """Lengths that no number of ranks divides, parameters shorter than there are ranks, and a norm."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 12), nn.LayerNorm(6), nn.Linear(12, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.double()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.first(x), self.second(x) * self.scale


def data(step, part, rank):
    generator = torch.Generator().manual_seed(100 * step + 10 * part + rank)
    return torch.randn(BATCH, 6, dtype=torch.float64, generator=generator)


def losses_of(model, x):
    first, second = model(x)
    return {
        "first": F.cross_entropy(first, torch.arange(len(x)) % 3),
        "second": (second - 1).square().mean(),
        "third": second.abs().mean() - first.mean(),
    }


TENSOR_PARALLEL = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def fsdp(model, size):
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def some_left(model, size):
    """The heads and the scale stay plain parameters."""
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=False)


def hybrid(model, size):
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def tensor_parallel(model, size):
    mesh = init_device_mesh("cpu", (size,))
    for block in model.blocks:
        parallelize_module(block, mesh, TENSOR_PARALLEL)


def both(model, size):
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], TENSOR_PARALLEL)
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model, case, batches):
    """Take some steps on the mean of the batches' losses; return gradients, Gramians, weights and parameters."""
    options = dict(case.get("options", {}))
    optimizer = GradientAligner(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        rules.GASoft(0.3) if case["rule"] == "ga-soft" else case["rule"],
        **options,
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=case["scale"]) if "scale" in case else None
    steps = []
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = case.get("parts", 1)
        for part in range(parts):
            of_batches = [losses_of(model, data(step, part, batch)) for batch in batches]
            losses = {name: sum(one[name] for one in of_batches) / len(of_batches) for name in of_batches[0]}
            with optimizer.accumulate() if part + 1 < parts else nullcontext():
                optimizer.backward(losses, scaler=scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        if case.get("clip"):
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        steps.append(
            {
                "gradients": [whole(p.grad).clone() for p in model.parameters()],
                "gramian": optimizer.report.gramian,
                "weights": optimizer.report.weights,
            }
        )
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return {"steps": steps, "parameters": [whole(p.detach()).clone() for p in model.parameters()]}


CASES = {
    **{rule: {"rule": rule} for rule in ("sum", "pcgrad", "ga-soft", "upgrad", "nash-mtl")},
    "pcgrad, by tensors": {"rule": "pcgrad", "options": {"granularity": "tensor"}},
    "pcgrad, shared": {"rule": "pcgrad", "options": {"scope": "shared"}},
    "ga-soft, shared": {"rule": "ga-soft", "options": {"scope": "shared"}},
    "pcgrad, every other": {"rule": "pcgrad", "options": {"update_every": 2}},
    "pcgrad, micro-batches": {"rule": "pcgrad", "parts": 2},
}
# torch's clip_grad_norm_ takes the DTensors of one mesh alone, and its GradScaler no plain tensors beside them.
ON_ONE_MESH = {
    "upgrad, clipped": {"rule": "upgrad", "clip": True},
    "nash-mtl, scaled": {"rule": "nash-mtl", "scale": 2.0**10},
}


def one_block_not_over_data(model, size):
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], TENSOR_PARALLEL)
    fully_shard(model.blocks[0], mesh=mesh["data"])


# How the model is sharded, for how many ranks, and how many of them see the same data.
LAYOUTS = {
    "fsdp": (fsdp, (2, 4), 1),
    "some left": (some_left, (2, 4), 1),
    "hybrid": (hybrid, (4,), 1),
    "tensor": (tensor_parallel, (2,), 2),
    "fsdp and tensor": (both, (4,), 2),
    "one block not over data": (one_block_not_over_data, (4,), 2),
}


def cases_of(layout):
    return CASES | ON_ONE_MESH if layout in ("fsdp", "hybrid") else CASES


def train_all(rank, size, layouts):
    outcomes = {}
    for layout in layouts:
        outcomes[layout] = {}
        for name, case in cases_of(layout).items():
            shard, _, together = LAYOUTS[layout]
            model = Net()
            shard(model, size)
            outcomes[layout][name] = train(model, case, [rank // together])
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What every case gave on each rank, by the number of ranks."""
    layouts = {size: [layout for layout, (_, sizes, _) in LAYOUTS.items() if size in sizes] for size in (2, 4)}
    return {
        size: processes.run(train_all, size, chosen, folder=tmp_path_factory.mktemp("ranks"))
        for size, chosen in layouts.items()
    }


def error(ours, reference):
    pairs = list(zip(ours, reference, strict=True))
    return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt().item()


@pytest.mark.parametrize(
    ("size", "layout", "name"),
    [(size, layout, name) for layout, (_, sizes, _) in LAYOUTS.items() for size in sizes for name in cases_of(layout)],
)
def test_shards_equal_one_process(outcomes, size, layout, name):
    on_ranks, together = outcomes[size], LAYOUTS[layout][2]
    assert "raised" not in on_ranks[0], on_ranks[0]
    reference = train(Net(), cases_of(layout)[name], range(size // together))
    for outcome in on_ranks:
        ours = outcome[layout][name]
        for here, there in zip(ours["steps"], reference["steps"], strict=True):
            found = error(here["gradients"], there["gradients"])
            print(f"{size} ranks, {layout}, {name}: error {found:.1e}")  # noqa: T201 - pytest -s shows it
            assert found < 1e-9
            assert here["gramian"].isfinite().all()  # stacked: all products are seen
            seen = there["gramian"].isfinite()
            assert torch.allclose(here["gramian"][seen], there["gramian"][seen], rtol=1e-8, atol=1e-14)
            assert torch.allclose(here["weights"], there["weights"], rtol=1e-6, atol=1e-9)
        assert error(ours["parameters"], reference["parameters"]) < 1e-8


def beside(rank, size):
    """What becomes of a ``p.grad`` that is there, of hooks and of memory."""
    model = Net()
    fsdp(model, size)
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "sum")
    calls = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.to_local().clone()))
    once = []
    for _ in range(2):
        optimizer.backward(losses_of(model, data(0, 0, rank)))
        once.append([p.grad.to_local().clone() for p in model.parameters()])
    storages = {g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in map(local, model.parameters())}
    held = sum(storages.values())
    model.zero_grad()
    sum(losses_of(model, data(0, 0, rank)).values()).backward()
    storages = {g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in map(local, model.parameters())}
    return {"first": once[0], "second": once[1], "calls": calls, "held": held, "plainly": sum(storages.values())}


def local(parameter):
    return parameter.grad.to_local()


def test_gradients_that_are_there_hooks_and_memory(tmp_path):
    for outcome in processes.run(beside, 2, folder=tmp_path):
        for one, two in zip(outcome["first"], outcome["second"], strict=True):
            assert torch.allclose(two, 2 * one)
        seen = [*outcome["first"], *outcome["second"]]  # a hook runs once a step, on what becomes p.grad
        # and, after these, at the plain backward, which calls those of fully_shard's parameters as it likes
        assert len(outcome["calls"]) >= len(seen)
        assert all(torch.equal(a, b) for a, b in zip(outcome["calls"], seen, strict=False))
        assert outcome["held"] <= outcome["plainly"]


def too_small_a_mesh(rank, size):
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
    model = Net()
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], TENSOR_PARALLEL)
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "sum")
    with pytest.raises(ValueError, match=r"device mesh of 2 ranks, got 4 ranks"):
        optimizer.backward(losses_of(model, data(0, 0, rank // 2)))
    return {"refused": True}


def test_ranks_beyond_the_mesh_are_refused(tmp_path):
    assert processes.run(too_small_a_mesh, 4, folder=tmp_path) == [{"refused": True}] * 4


WHOLE = {
    "rows": ("graddrop", {}),
    "streamed": ("ga-soft", {"collector": "streamed"}),
    "batched": ("pcgrad", {"collector": "batched"}),
    "probed": ("ga-soft", {}),
}


def refused(rank, size, layouts):
    messages = {}
    for layout in layouts:
        shard, _, together = LAYOUTS[layout]
        for name, (rule, options) in WHOLE.items():
            model = Net()
            shard(model, size)
            optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule, **options)
            losses = losses_of(model, data(0, 0, rank // together))
            probe = (lambda losses=losses: losses) if name == "probed" else None
            with pytest.raises(ValueError, match="where parameters are DTensors") as caught:
                optimizer.backward(losses, probe=probe)
            messages[layout, name] = str(caught.value)
    return messages


@pytest.mark.parametrize("size", [2, 4])
def test_what_needs_whole_gradients_is_refused(size, tmp_path):
    layouts = [layout for layout, (_, sizes, _) in LAYOUTS.items() if size in sizes]
    for outcome in processes.run(partial(refused, layouts=layouts), size, folder=tmp_path):
        assert set(outcome) == {(layout, name) for layout in layouts for name in WHOLE}
        for layout in layouts:
            messages = {name: outcome[layout, name] for name in WHOLE}
            assert "`rule` must be a function of the Gramian" in messages["rows"]
            assert "`collector` must be 'stacked' or 'auto'" in messages["streamed"]
            assert "`collector` must be 'stacked' or 'auto'" in messages["batched"]
            assert "`probe` must be None" in messages["probed"]
