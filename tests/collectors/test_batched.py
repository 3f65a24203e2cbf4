"""The batched collector against the stacked one, which differentiates one group after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gradalign import GradientAligner
from gradalign.rules import Constant
from tests import auxiliaries, models


def make(kind, rule, collector, **options):
    model = models.make(kind)
    return model, GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule, collector=collector, **options)


def assert_same_step(one, two, **tolerances):
    (model, optimizer), (other, reference) = one, two
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}", **tolerances)
            assert p.grad.stride() == q.grad.stride()
    # The Gramians are float64 sums of gradients that are float32, which another order of sums rounds otherwise: held to
    # float32's rounding, not float64's.
    assert_close(optimizer.report.gramian, reference.report.gramian, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", [models.TwoHeads, models.Convolutional, models.MixedPrecision])
@pytest.mark.parametrize("rule", ["sum", "pcgrad", "upgrad", "ga-soft", "graddrop"])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_it_gives_what_the_stacked_collector_gives(kind, rule, granularity):
    steps = []
    for collector in ("batched", "stacked"):
        model, optimizer = make(kind, rule, collector, granularity=granularity)
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.backward(model.losses())
        assert optimizer.report.collector == collector
        steps.append((model, optimizer))
    coarse = {"rtol": 2e-2, "atol": 1e-3} if kind is models.MixedPrecision else {"rtol": 1e-4, "atol": 1e-6}
    assert_same_step(*steps, **coarse)


@pytest.mark.parametrize("options", [{}, {"update_every": 2}], ids=str)
def test_micro_batches_and_gradients_that_are_there(options):
    steps = []
    for collector in ("batched", "stacked"):
        model, optimizer = make(models.TwoHeads, Constant([2.0, -0.5]), collector, **options)
        for _ in range(2):
            for _ in range(2):
                with optimizer.accumulate():
                    optimizer.backward(model.losses())
            optimizer.backward(model.losses())
        steps.append((model, optimizer))
    assert_same_step(*steps)


def test_groups_of_several_losses_and_of_one_element():
    steps = []
    for collector in ("batched", "stacked"):
        model, optimizer = make(models.TwoHeads, "pcgrad", collector)
        first, second = model.losses().values()
        optimizer.backward({"both": [first, second.reshape(1)], "second": second.double(), "first": first})
        steps.append((model, optimizer))
    assert_same_step(*steps)


def test_one_group():
    steps = [make(models.TwoHeads, "sum", collector) for collector in ("batched", "stacked")]
    for model, optimizer in steps:
        optimizer.backward({"first": model.losses()["first"]})
    assert_same_step(*steps)


def test_gradients_of_other_groups_are_not_kept_alive():
    model, optimizer = make(models.TwoHeads, "pcgrad", "batched")
    optimizer.backward(model.losses())
    weight = model.trunk.weight
    assert weight.grad.untyped_storage().nbytes() == weight.nbytes


def test_gradients_of_earlier_steps_never_change():
    model, optimizer = make(models.TwoHeads, "pcgrad", "batched")
    kept = []
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(model.losses())
        kept.append((model.trunk.weight.grad, model.trunk.weight.grad.clone()))
        optimizer.step()
    assert all(torch.equal(gradient, as_it_was) for gradient, as_it_was in kept)


class Unbatched(auxiliaries.Opaque):
    """The identity, whose backward vmap cannot take: it asks for a value."""

    @staticmethod
    def backward(ctx, gradient):
        return gradient * bool(gradient.isfinite().all())


def test_an_operator_that_vmap_cannot_take_is_refused():
    model, optimizer = make(models.TwoHeads, "pcgrad", "batched")
    losses = {name: Unbatched.apply(loss) for name, loss in model.losses().items()}
    with pytest.raises(RuntimeError, match=r"collector='batched' every operator .* take collector='stacked'"):
        optimizer.backward(losses)
    assert all(p.grad is None for p in model.parameters())
    optimizer.backward(model.losses())  # it goes on


def test_other_errors_are_not_put_down_to_vmap():
    model, optimizer = make(models.TwoHeads, "pcgrad", "batched")
    losses = model.losses()
    optimizer.backward(losses)
    with pytest.raises(RuntimeError, match=r"^Trying to backward through the graph a second time"):
        optimizer.backward(losses)


def test_losses_that_reach_nothing_are_refused():
    model, optimizer = make(models.TwoHeads, "pcgrad", "batched")
    other = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"`losses\['a'\]` must reach a parameter"):
        optimizer.backward({"a": other.sum(), "b": other.square().sum()})
    with pytest.raises(ValueError, match=r"`losses\['b'\]` must reach a parameter"):
        optimizer.backward({"a": model.losses()["first"], "b": other.sum()})
    assert all(p.grad is None for p in model.parameters())


def test_a_scaler_multiplies_every_group():
    steps = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model, optimizer = make(models.TwoHeads, "pcgrad", "batched")
        optimizer.backward(model.losses(), scaler=scaler)
        if scaler is not None:
            assert_close(model.trunk.weight.grad, 2.0**10 * steps[0][0].trunk.weight.grad)
            scaler.unscale_(optimizer)
        steps.append((model, optimizer))
    assert_same_step(*steps)


def test_it_cannot_tell_which_parameters_are_shared():
    with pytest.raises(ValueError, match=r"`collector` must be 'stacked' or 'auto' with scope='shared', got 'batched'"):
        make(models.TwoHeads, "pcgrad", "batched", scope="shared")
