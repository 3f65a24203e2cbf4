"""float16 training: rules see the gradients without the scaler's scale, and the scaler sees every overflow."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from gradalign import GradientAligner, rules
from tests import models

SCALE = 2.0**12  # a power of two, as every scale of a GradScaler is: nothing is rounded by it
MADE = {
    "constant": lambda: rules.Constant([2.0, -0.5]),
    "momentum-weights": lambda: rules.MomentumWeights("pcgrad"),
    "trimmed-mean": lambda: rules.TrimmedMean(trim=0),
}
every_rule = pytest.mark.parametrize("name", [name for name in rules.names() if name != "krum"])  # needs three groups


def rule_of(name):
    return MADE.get(name, lambda: rules.get(name))()


def make(rule="pcgrad", inner=torch.optim.SGD, **options):
    model = models.make(models.TwoHeads)
    return model, GradientAligner(inner(model.parameters(), lr=0.1), rule, **options)


def scaler_of(scale=SCALE, **options):
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


def take_steps(model, optimizer, scaler=None, steps=3):
    """Train; return the gradients that each step saw and the reports."""
    seen, reports = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(model.losses(), scaler=scaler)
        reports.append(optimizer.report)
        if scaler is None:
            seen.append(models.gradients(model))
            optimizer.step()
        else:
            scaler.unscale_(optimizer)
            seen.append(models.gradients(model))
            scaler.step(optimizer)
            scaler.update()
    return seen, reports


def assert_same_bits(one, two):
    for step, other in zip(one, two, strict=True):
        for name, gradient in step.items():
            assert (gradient is None) == (other[name] is None)
            assert gradient is None or torch.equal(gradient, other[name]), name


@every_rule
@pytest.mark.parametrize("growth", [1000, 1], ids=["one scale", "a scale that grows at every step"])
def test_every_rule_gives_the_bits_that_it_gives_without_a_scaler(name, growth):
    plain = take_steps(*make(rule_of(name)))
    scaled = take_steps(*make(rule_of(name)), scaler_of(growth_interval=growth))
    assert_same_bits(plain[0], scaled[0])
    for one, two in zip(plain[1], scaled[1], strict=True):
        assert torch.equal(one.gramian, two.gramian)
        assert one.weights is None or torch.equal(one.weights, two.weights)


@pytest.mark.parametrize(
    "options",
    [
        {"collector": "stacked"},
        {"collector": "streamed"},
        {"collector": "stacked", "granularity": "tensor"},
        {"scope": "shared"},
        {"update_every": 2},
        {"update_every": 2, "scope": "shared", "granularity": "tensor"},
    ],
    ids=str,
)
def test_every_way_to_collect(options):
    rule = rules.GASoft(0.3)
    plain, scaled = take_steps(*make(rule, **options)), take_steps(*make(rule, **options), scaler_of())
    assert_same_bits(plain[0], scaled[0])


def test_micro_batches():
    seen = []
    for scaler in (None, scaler_of()):
        model, optimizer = make()
        with optimizer.accumulate():
            optimizer.backward(model.losses(), scaler=scaler)
        optimizer.backward(model.losses(), scaler=scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        seen.append(models.gradients(model))
    assert_same_bits(seen[:1], seen[1:])


@pytest.mark.parametrize("first", [True, False])
def test_micro_batches_with_and_without_a_scaler_do_not_mix(first):
    model, optimizer = make()
    with optimizer.accumulate():
        optimizer.backward(model.losses(), scaler=scaler_of() if first else None)
    with pytest.raises(ValueError, match=r"`scaler` must be given for every micro-batch or for none"):
        optimizer.backward(model.losses(), scaler=None if first else scaler_of())


def test_a_probe():
    seen = []
    for scaler in (None, scaler_of()):
        model, optimizer = make(rules.GASoft(0.3))

        def probe(model=model):
            return {"second": model.losses()["second"]}

        optimizer.backward({"first": model.losses()["first"]}, probe=probe, scaler=scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        seen.append((models.gradients(model), optimizer.report))
    (plain, report), (scaled, other) = seen
    assert_same_bits([plain], [scaled])
    assert_close(report.gramian, other.gramian, equal_nan=True, rtol=0, atol=0)


def test_a_disabled_scaler_is_none():
    model, optimizer = make(nonfinite="skip")
    reference, plain = make(nonfinite="skip")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer.backward(model.losses(), scaler=scaler)
    plain.backward(reference.losses())
    assert_same_bits([models.gradients(model)], [models.gradients(reference)])
    losses = model.losses()
    optimizer.zero_grad()
    optimizer.backward({"first": losses["first"], "second": losses["second"] * torch.nan}, scaler=scaler)
    assert optimizer.report.skipped


@pytest.mark.parametrize("scaler", [1024.0, object(), torch.amp.GradScaler])
def test_something_else_is_refused(scaler):
    model, optimizer = make()
    with pytest.raises(TypeError, match=r"`scaler` must be a torch\.amp\.GradScaler or None"):
        optimizer.backward(model.losses(), scaler=scaler)
    assert all(parameter.grad is None for parameter in model.parameters())


def state_of(rule):
    """What a rule remembers of gradients, not how many numbers it has drawn."""
    return copy.deepcopy(rule.state_dict().get("memory"))


@every_rule
@pytest.mark.parametrize("broken", ["first", "second"])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_an_overflow_in_one_group_skips_the_step_and_lowers_the_scale(name, broken, nonfinite):
    model, optimizer = make(rule_of(name), nonfinite=nonfinite)
    scaler = scaler_of()
    take_steps(model, optimizer, scaler, steps=1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    remembered = state_of(optimizer.rule)
    losses = model.losses()
    losses[broken] = losses[broken] + 1e36 * model.trunk.weight.sum()  # finite until it is scaled
    optimizer.zero_grad()
    optimizer.backward(losses, scaler=scaler)
    assert not optimizer.report.skipped
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.skipped_steps == 0
    if remembered is not None:
        assert_close(state_of(optimizer.rule), remembered, rtol=0, atol=0)
    take_steps(model, optimizer, scaler, steps=1)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_clipping_is_that_of_unscaled_gradients():
    norms = []
    for scaler in (None, scaler_of()):
        model, optimizer = make()
        optimizer.backward(model.losses(), scaler=scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1e-3))
    assert torch.equal(*norms)


class Half(nn.Module):
    """A perceptron whose loss is small enough to vanish in float16 unless it is scaled."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.body = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(64, 4), nn.Linear(64, 4)])

    def losses(self, dtype=None):
        generator = torch.Generator().manual_seed(5)
        inputs, labels = torch.randn(32, 16, generator=generator), torch.arange(32) % 4
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            hidden = self.body(inputs)
            logits = [head(hidden).float() for head in self.heads]
        return {
            "main": 1e-4 * F.cross_entropy(logits[0], labels),
            "against": 1e-4 * (F.cross_entropy(logits[1], labels.flip(0)) - 0.9 * F.cross_entropy(logits[0], labels)),
        }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["pcgrad", "ga-soft", "nash-mtl", "upgrad", "graddrop"])
def test_autocast_gives_the_alignment_of_float32(rule, dtype):
    def aligned(dtype, scaler):
        model = Half()
        optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule)
        optimizer.backward(model.losses(dtype), scaler=scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        return torch.cat([p.grad.flatten() for p in model.parameters()]), optimizer.report

    exact, wide = aligned(None, None)
    coarse, narrow = aligned(dtype, scaler_of(2.0**16) if dtype == torch.float16 else None)
    assert wide.conflicts == narrow.conflicts == (("main", "against"),)
    precision = torch.finfo(dtype).eps
    assert_close(narrow.norms, wide.norms, rtol=8 * precision, atol=0)
    assert_close(narrow.cosines, wide.cosines, rtol=0, atol=8 * precision)
    if rule != "graddrop":  # which keeps or drops whole elements
        assert (coarse - exact).norm() < 16 * precision * exact.norm()


def test_float16_without_a_scaler_loses_what_a_scaler_keeps():
    def norm(scaler):
        model = Half()
        optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "sum")
        losses = {name: 1e-3 * loss for name, loss in model.losses(torch.float16).items()}
        optimizer.backward(losses, scaler=scaler)
        return optimizer.report.norms

    model = Half()
    optimizer = GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), "sum")
    optimizer.backward({name: 1e-3 * loss for name, loss in model.losses().items()})
    exact = optimizer.report.norms
    assert ((norm(None) - exact).abs() > 0.05 * exact).all()
    assert ((norm(scaler_of(2.0**20)) - exact).abs() < 0.01 * exact).all()
