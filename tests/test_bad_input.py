"""Input that makes no sense: one sentence each, and nothing of the user's has changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradalign import GradientAligner, NonFiniteError
from gradalign.rules import GAHard, GASoft
from tests import models


def make(rule="sum", **options):
    model = models.make(models.TwoHeads)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model, GradientAligner(torch.optim.AdamW(model.parameters()), rule, **options)


def detached(model):
    return {"ce": model.losses()["first"], "kd": model.losses()["second"].detach()}


BAD_LOSSES = {
    "a tensor": (
        TypeError,
        r"`losses` must map each loss group's name to a scalar loss, got Tensor; write backward\({",
        lambda m: m.losses()["first"],
    ),
    "a list": (TypeError, r"`losses` must map .* got list", lambda m: list(m.losses().values())),
    "no groups": (ValueError, r"`losses` must hold at least one loss group, got none", lambda m: {}),
    "a name that is none": (
        TypeError,
        r"`losses` must have names \(strings\) as keys, got 3",
        lambda m: {3: m.losses()["first"]},
    ),
    "an empty group": (
        ValueError,
        r"`losses\['kd'\]` must hold at least one loss, got an empty sequence",
        lambda m: {"ce": m.losses()["first"], "kd": []},
    ),
    "a number": (
        TypeError,
        r"`losses\['kd'\]` must be a scalar tensor or a sequence of them, got float",
        lambda m: {"kd": 1.0},
    ),
    "a number in a group": (
        TypeError,
        r"`losses\['kd'\]` must be a scalar tensor, got float 1.0",
        lambda m: {"kd": [1.0]},
    ),
    "a non-scalar loss": (
        ValueError,
        r"`losses\['kd'\]` must be scalar, got shape \(4, 5\); reduce it",
        lambda m: {"kd": m.trunk.weight * 2},
    ),
    "a loss without a graph": (
        ValueError,
        r"`losses\['kd'\]` must have a graph to differentiate, got a loss that requires no gradient",
        detached,
    ),
    "a loss that reaches no parameter": (
        ValueError,
        r"`losses\['kd'\]` must reach a parameter of the optimizer .* got a loss that reaches none",
        lambda m: {"ce": m.losses()["first"], "kd": nn.Linear(2, 1)(torch.ones(2)).sum()},
    ),
    "NaN in one group": (
        NonFiniteError,
        r"The gradient of loss group 'kd' must be finite, got NaN or infinity",
        lambda m: {"ce": m.losses()["first"], "kd": m.losses()["second"] * torch.nan},
    ),
    "infinity in one group": (
        NonFiniteError,
        r"The gradient of loss group 'kd' must be finite",
        lambda m: {"ce": m.losses()["first"], "kd": m.losses()["second"] * torch.inf},
    ),
    "a complex loss": (
        TypeError,
        r"`losses\['kd'\]` must be a real floating-point tensor, got torch.complex64; take .real or .abs\(\)",
        lambda m: {"kd": m.losses()["first"].to(torch.complex64)},
    ),
    "sparse gradients": (
        ValueError,
        r"`losses\['kd'\]` must have dense gradients, got a torch.sparse_coo one .* sparse=False",
        None,
    ),
}


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_bad_losses_change_nothing(case):
    error, message, losses = BAD_LOSSES[case]
    model, optimizer = make()
    if losses is None:
        embedding = nn.Embedding(3, 2, sparse=True)
        optimizer.add_param_group({"params": embedding.parameters()})
        losses = lambda m: {"kd": embedding(torch.tensor([1])).sum()}  # noqa: E731
    state = optimizer.state_dict()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match=message):
        optimizer.backward(losses(model))
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(parameter, old)
        assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert optimizer.state_dict() == state
    assert optimizer.report is None
    optimizer.backward(model.losses())  # and the next call works
    assert not torch.equal(model.trunk.weight.grad, torch.ones_like(model.trunk.weight))


@pytest.mark.parametrize("rule", [GASoft(0.3), GAHard(0.3)])
def test_one_group_where_the_rule_needs_two(rule):
    model, optimizer = make(rule)
    with pytest.raises(
        ValueError, match=r"must have at least 2 loss groups, got 1 \('ce'\); pass another group to backward"
    ):
        optimizer.backward({"ce": model.losses()["first"]})


def test_an_anchor_that_is_no_group_offers_near_names():
    model, optimizer = make(GASoft(0.3, anchor="frist"))
    with pytest.raises(
        ValueError, match=r"`anchor` must be one of 'first', 'second', got 'frist'; did you mean 'first'\?"
    ):
        optimizer.backward(model.losses())
    assert torch.equal(model.trunk.weight.grad, torch.ones_like(model.trunk.weight))


def test_process_group_while_torch_distributed_runs(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(
            TypeError, match=r"`process_group` must be 'auto', a torch.distributed.ProcessGroup or None"
        ):
            make(process_group=3)
        for process_group in ("auto", None, torch.distributed.group.WORLD):  # one rank has nobody to average with
            model, optimizer = make(process_group=process_group)
            optimizer.backward(model.losses())
    finally:
        torch.distributed.destroy_process_group()


BAD_ARGUMENTS = {
    "rule name": (ValueError, r"`rule` must be one of .* got 'pcgard'; did you mean 'pcgrad'", {"rule": "pcgard"}),
    "rule class": (
        TypeError,
        r"`rule` must be a Rule, a RowRule, or the name of one, .* got the class GASoft; write GASoft\(\.\.\.\)",
        {"rule": GASoft},
    ),
    "rule of another kind": (TypeError, r"`rule` must be a Rule, .* got function", {"rule": lambda G: G}),
    "rule without its hyper-parameters": (TypeError, r"`constant` must be given weights", {"rule": "constant"}),
    "scope name": (
        ValueError,
        r"`scope` must be one of 'all', 'shared', got 'share'; did you mean 'shared'",
        {"scope": "share"},
    ),
    "scope of another kind": (TypeError, r"`scope` must hold parameters in a list, got int", {"scope": 3}),
    "scope that is one parameter": (
        TypeError,
        r"`scope` must hold parameters in a list, got Parameter",
        {"scope": nn.Parameter(torch.ones(1))},
    ),
    "scope with nothing": (ValueError, r"`scope` must hold at least one parameter, got none", {"scope": iter(())}),
    "scope with names": (
        TypeError,
        r"`scope` must hold parameters, got tuple at position 0; pass parameters themselves",
        {"scope": nn.Linear(1, 1).named_parameters()},
    ),
    "scope with a stranger": (
        ValueError,
        r"`scope` must hold parameters of the optimizer, got one of shape \(7, 1\) at position 0",
        {"scope": nn.Linear(1, 7).parameters()},
    ),
    "granularity name": (
        ValueError,
        r"`granularity` must be one of .* got 'tensors'; did you mean 'tensor'",
        {"granularity": "tensors"},
    ),
    "granularity of another kind": (TypeError, r"`granularity` must be 'global', .* got int", {"granularity": 4}),
    "granularity with a stranger": (
        ValueError,
        r"`granularity` must hold parameters of the optimizer, got one of shape \(7, 1\)",
        {"granularity": [list(nn.Linear(1, 7).parameters())]},
    ),
    "granularity that is flat": (
        TypeError,
        r"`granularity` must hold parameters in a list, got Parameter",
        {"granularity": list(nn.Linear(1, 7).parameters())},
    ),
    "collector": (
        ValueError,
        r"`collector` must be one of .* got 'stack'; did you mean 'stacked'",
        {"collector": "stack"},
    ),
    "update_every": (ValueError, r"`update_every` must be an integer of at least 1, got 0", {"update_every": 0}),
    "nonfinite": (
        ValueError,
        r"`nonfinite` must be one of 'raise', 'skip', 'propagate', got 'ignore'",
        {"nonfinite": "ignore"},
    ),
    "process_group": (
        ValueError,
        r"`process_group` must be 'auto' or None while torch.distributed does not run, got int",
        {"process_group": 3},
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case):
    error, message, options = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        make(**options)


def test_a_parameter_in_two_blocks():
    model = models.make(models.TwoHeads)
    blocks = [list(model.trunk.parameters()), [model.trunk.bias]]
    with pytest.raises(
        ValueError, match=r"`granularity` must name each parameter once, got one of shape \(4,\) again in block 1"
    ):
        GradientAligner(torch.optim.SGD(model.parameters()), "sum", granularity=blocks)


def test_what_is_no_optimizer():
    model, optimizer = make()
    with pytest.raises(
        TypeError, match=r"`optimizer` must be a torch.optim.Optimizer that is not wrapped yet, got TwoHeads"
    ):
        GradientAligner(model, "sum")
    with pytest.raises(TypeError, match=r"not wrapped yet, got GradientAligner"):
        GradientAligner(optimizer, "sum")
    with pytest.raises(TypeError, match=r"`optimizer` must hold real floating-point parameters, got torch.complex64"):
        GradientAligner(torch.optim.SGD([torch.zeros(2, dtype=torch.complex64, requires_grad=True)]), "sum")


def test_complex_parameters_that_join_later():
    model, optimizer = make()
    optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.complex64, requires_grad=True)]})
    with pytest.raises(
        TypeError, match=r"must hold real floating-point parameters, got torch.complex64 of shape \(2,\)"
    ):
        optimizer.backward(model.losses())
    assert torch.equal(model.trunk.weight.grad, torch.ones_like(model.trunk.weight))


@pytest.mark.parametrize("kind", ["sparse", "expanded"])
def test_a_grad_that_cannot_be_added_to(kind):
    model, optimizer = make("pcgrad")
    odd = torch.zeros(1).expand(3) if kind == "expanded" else torch.zeros(3).to_sparse()
    model.first.bias.grad = odd
    before = optimizer.rule.state_dict()["generator"]
    with pytest.raises(
        ValueError, match=r"`p.grad` must be None or a dense tensor with memory of its own, got .* shape \(3,\)"
    ):
        optimizer.backward(model.losses())
    assert torch.equal(model.trunk.weight.grad, torch.ones_like(model.trunk.weight))
    assert model.first.bias.grad is odd
    assert torch.equal(optimizer.rule.state_dict()["generator"], before)


def test_nothing_to_train():
    model, optimizer = make()
    losses = model.losses()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"`optimizer` must hold a parameter that requires a gradient, got none"):
        optimizer.backward(losses)
