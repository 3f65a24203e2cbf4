"""torch.distributed.checkpoint: save sharded, load on as many ranks or others, go on."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F

from gradalign import GradientAligner, rules
from tests.distributed import processes
from tests.distributed.test_sharded import Net, error, fsdp, whole
from tests.test_resume import difference

BATCH, STOP, STEPS = 8, 3, 6

CASES = {
    "pcgrad": ("pcgrad", {}),
    "gradvac, by tensors": ("gradvac", {"granularity": "tensor"}),
    "momentum-weights": ("momentum-weights", {}),
    "ga-soft": ("ga-soft", {}),
    "pcgrad, every other": ("pcgrad", {"update_every": 2}),  # stopped between two alignments
    "ga-soft, every other, shared": ("ga-soft", {"update_every": 2, "scope": "shared"}),
}


def losses_of(model, step, rank, size):
    """The losses of a rank's part of the batch."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, dtype=torch.float64, generator=generator)[rank::size]
    first, second = model(x)
    return {
        "first": F.cross_entropy(first, (x.sum(-1) > 0).long()),
        "second": (second - 1).square().mean(),
        "third": second.abs().mean() - first.mean(),
    }


def make(name, size):
    rule, options = CASES[name]
    rule = rules.MomentumWeights("pcgrad") if rule == "momentum-weights" else rule
    model = Net()
    if size > 1:
        fsdp(model, size)
    return model, GradientAligner(torch.optim.AdamW(model.parameters(), lr=1e-2), rule, **options)


def train(model, optimizer, steps, rank, size):
    for step in steps:
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, step, rank, size))
        optimizer.step()


def outcome(model, optimizer):
    own = optimizer.state_dict()["gradalign"]
    return {
        "parameters": [whole(p.detach()).clone() for p in model.parameters()],
        "moments": [whole(optimizer.state[p]["exp_avg_sq"]).clone() for p in model.parameters()],
        "generator": own["rule_state"].get("generator"),
        "own": own,
    }


def state_of(model, optimizer, options=None):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        "alignment": optimizer.alignment_state,
    }


def save(rank, size, folder):
    """Train, save on the way, and go on."""
    outcomes = {}
    for name in CASES:
        model, optimizer = make(name, size)
        train(model, optimizer, range(STOP), rank, size)
        dcp.save(state_of(model, optimizer), checkpoint_id=folder / name)
        train(model, optimizer, range(STOP, STEPS), rank, size)
        outcomes[name] = outcome(model, optimizer)
    return outcomes


def load(model, optimizer, path, options=None):
    state = state_of(model, optimizer, options)
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def resume(rank, size, folder):
    """Go on from the checkpoints, and what else two ranks can do with them."""
    outcomes = others(rank, size, folder) if size == 2 else {}
    for name in CASES:
        model, optimizer = make(name, size)
        load(model, optimizer, folder / name)
        train(model, optimizer, range(STOP, STEPS), rank, size)
        outcomes[name] = outcome(model, optimizer)
    return outcomes


def without(rank, size, folder):
    """Go on with the model and the inner optimizer alone."""
    model, optimizer = make("pcgrad", size)
    before = optimizer.alignment_state.state_dict()
    load(model, optimizer, folder / "pcgrad")
    optimizer.alignment_state.load_state_dict(before)
    train(model, optimizer, range(STOP, STEPS), rank, size)
    return outcome(model, optimizer)


def flattened(rank, size, folder):
    """Save and load with what torch calls a flattened optimizer state, with one ``Stateful`` of the user's around."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = make("momentum-weights", size)
    train(model, optimizer, range(STOP), rank, size)
    state = state_of(model, optimizer, options)
    state["alignment"] = state["alignment"].state_dict()
    dcp.save({"all": state}, checkpoint_id=folder / "flattened")
    train(model, optimizer, range(STOP, STEPS), rank, size)
    again, other = make("momentum-weights", size)
    state = state_of(again, other, options)
    state["alignment"] = state["alignment"].state_dict()
    dcp.load({"all": state}, checkpoint_id=folder / "flattened")
    set_model_state_dict(again, state["model"])
    set_optimizer_state_dict(again, other, state["optimizer"], options=options)
    other.alignment_state.load_state_dict(state["alignment"])
    train(again, other, range(STOP, STEPS), rank, size)
    return {"one": outcome(model, optimizer)["parameters"], "two": outcome(again, other)["parameters"]}


def of_another_rule(rank, size, folder):
    """Try to load another rule's state; return whether everything is as before."""
    _, optimizer = make("ga-soft", size)
    inner = optimizer.state_dict()["state"]
    own = optimizer.state_dict()["gradalign"]
    with pytest.raises(ValueError, match="with the rule 'ga-soft', got one with 'pcgrad'"):
        dcp.load({"alignment": optimizer.alignment_state}, checkpoint_id=folder / "pcgrad")
    return optimizer.state_dict()["gradalign"] == own and optimizer.state_dict()["state"] == inner


def others(rank, size, folder):
    return {
        "without": without(rank, size, folder),
        "flattened": flattened(rank, size, folder),
        "of another rule": of_another_rule(rank, size, folder),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoints, and what the run that was not stopped came to on each rank."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, processes.run(save, 2, folder, folder=tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def resumed(saved, tmp_path_factory):
    """What every number of ranks made of the checkpoints; one is this process, and its model is not sharded."""
    on_ranks = {size: processes.run(resume, size, saved[0], folder=tmp_path_factory.mktemp("ranks")) for size in (2, 4)}
    with pytest.warns(UserWarning, match="torch.distributed is disabled, unavailable or uninitialized"):
        return {1: [resume(0, 1, saved[0])], **on_ranks}


@pytest.mark.parametrize("size", [2, 1, 4], ids=lambda size: f"on {size} ranks")
@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_from_a_distributed_checkpoint(saved, resumed, name, size):
    whole_run, again = saved[1], resumed[size]
    for one in (*whole_run, *again):
        assert "raised" not in one, one
    expected = whole_run[0][name]
    for one in again:
        ours = one[name]
        for key in ("parameters", "moments"):
            # Other ranks, other sums: the order of additions differs.
            assert error(ours[key], expected[key]) < 1e-8
        if size == 2:
            assert difference(ours, expected) is None
        assert ours["own"]["groups"] == ["first", "second", "third"]
        assert ours["own"]["kept"]["served"] == expected["own"]["kept"]["served"]
        if expected["generator"] is not None:
            assert torch.equal(ours["generator"], expected["generator"])


def test_the_alignment_s_state_is_what_makes_the_bits_the_same(saved, resumed):
    for whole_run, one in zip(saved[1], resumed[2], strict=True):
        assert "raised" not in one, one
        assert not torch.equal(one["without"]["generator"], whole_run["pcgrad"]["generator"])


def test_flattened_and_within_a_stateful_of_the_user_s(resumed):
    for one in resumed[2]:
        assert "raised" not in one, one
        assert all(torch.equal(a, b) for a, b in zip(*one["flattened"].values(), strict=True))


def test_a_distributed_checkpoint_of_another_rule_is_refused(resumed):
    for one in resumed[2]:
        assert "raised" not in one, one
        assert one["of another rule"]
