"""Auxiliaries seen through a probe, by way of the aligner: against the stacked collector, which differentiates them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from gradalign import GradientAligner
from gradalign.rules import GAHard, GASoft
from tests import models
from tests.auxiliaries import DIFFERENCES, FORWARD, WAYS, EarlyExit, Opaque, anchor, by_no_grad, finish, mutual, wrapped

RULES = [GASoft(0.4), GASoft(0.9, clamp=True), GAHard(0.4), GASoft(0.4, anchor="ce"), GASoft(0.4, anchor=0)]

# Weights by differences in float32 measure 1e-5; the bound is that of D_k, 1e-2, where |g_k| is like |g_a|.
TOLERANCE = {FORWARD: {}, DIFFERENCES: {"rtol": 1e-2, "atol": 1e-2}}


def two_models():
    torch.manual_seed(3)
    first, second = EarlyExit(), EarlyExit()
    second.load_state_dict(first.state_dict())
    return first, second


def drop_dropout(model):
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def seeded(f):
    torch.manual_seed(5)
    return f()


def squared(logits):
    return sum(part.square().mean() for part in logits)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("collector", ["auto", "probed"])
def test_as_stacked(rule, way, K, collector):
    model, reference = two_models()
    optimizer, exact = wrapped(model, rule, collector=collector), wrapped(reference, rule, collector="stacked")
    x = torch.randn(32, 6)

    def auxiliaries(of):  # the state of the random generator repeats, so that the masks are those of the anchor
        losses = {"kd": seeded(lambda: mutual(of, x)), "teacher": seeded(lambda: by_no_grad(of, x))}
        return dict(list(losses.items())[: K - 1])

    for _ in range(3):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        ce = seeded(lambda: anchor(model(x)))
        optimizer.backward(
            {"ce": ce}, probe=lambda: {name: finish(way, loss) for name, loss in auxiliaries(model).items()}
        )
        exact.backward({"ce": seeded(lambda: anchor(reference(x)))} | auxiliaries(reference))
        report, expected = optimizer.report, exact.report
        assert (report.collector, report.derivative) == ("probed", way)
        assert (expected.collector, expected.derivative) == ("stacked", None)
        assert report.names == expected.names
        assert_close(report.weights, expected.weights, **TOLERANCE[way])
        assert_close(report.gramian[0], expected.gramian[0], **TOLERANCE[way])
        assert torch.equal(report.gramian[:, 0], report.gramian[0])
        assert report.gramian[1:, 1:].isnan().all()
        assert set(report.conflicts) == {pair for pair in expected.conflicts if "ce" in pair}
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE[way])
        for name, buffer in model.named_buffers():
            if "num_batches" in name:
                assert buffer == before[name] + 1, name  # the anchor's forward, not the probe's
        optimizer.step()
        reference.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        exact.zero_grad()


@pytest.mark.parametrize("kind", [models.TwoHeads, models.Convolutional, models.Recurrent, models.MixedPrecision])
@pytest.mark.parametrize("way", WAYS)
def test_all_models(kind, way):
    model, reference = models.make(kind), models.make(kind)
    main, *others = model.losses()
    model.load_state_dict(reference.state_dict())
    optimizer, exact = wrapped(model), wrapped(reference, collector="stacked")
    exact.backward(reference.losses())
    loss = model.losses()[main]
    optimizer.backward({main: loss}, probe=lambda: {name: finish(way, model.losses()[name]) for name in others})
    rough = kind is models.MixedPrecision  # its bfloat16 head rounds, and differences step as for bfloat16
    tolerance = {"rtol": 0.1, "atol": 0.1} if rough else TOLERANCE[way]
    assert_close(optimizer.report.weights, exact.report.weights, **tolerance)
    assert_close(optimizer.report.gramian[0], exact.report.gramian[0], **tolerance)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        if p.grad is not None:
            assert_close(p.grad, q.grad, **tolerance)
        else:  # the anchor does not reach it: nothing is to be written
            assert q.grad is None or not q.grad.any()


def test_the_report_by_hand():
    # g_ce = (2, 0), g_kd = (1, 1), <g_kd, g_ce> = 2; w = .5 + .5 * 2/4 = .75, p.grad = .75 (2, 0) on top of (1, 1).
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    w.grad = torch.ones(2)
    optimizer = GradientAligner(torch.optim.SGD([w], lr=0.1), GASoft(alpha=0.5))
    optimizer.backward({"ce": w[0] * 2}, probe=lambda: {"kd": w.sum()})
    assert w.grad.tolist() == [2.5, 1.0]
    report = optimizer.report
    torch.testing.assert_close(
        report.gramian, torch.tensor([[4.0, 2.0], [2.0, torch.nan]], dtype=torch.float64), equal_nan=True
    )
    assert report.weights.tolist() == [0.75, 0.0]
    assert report.norms[0] == 2
    assert report.norms[1].isnan()
    assert report.cosines[0, 1].isnan()
    assert report.conflicts == ()
    assert not report.skipped
    assert repr(report) == "AlignmentReport(ce, kd: weights [0.75, 0.0], conflicts none)"
    optimizer.zero_grad()
    optimizer.backward({"ce": w[0] * 2}, probe=lambda: {"kd": [-w[0], -w[0] * 3, w[1].reshape(1)]})
    assert optimizer.report.weights[0] == -0.5  # .5 + .5 * -8/4, a reversal
    assert optimizer.report.conflicts == (("ce", "kd"),)
    assert optimizer.report.reversals == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_of_zero(way):
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = GradientAligner(torch.optim.SGD([w], lr=0.1), GASoft(alpha=0.5))
    optimizer.backward({"ce": (w * 0).sum()}, probe=lambda: {"kd": finish(way, w.sum())})
    assert optimizer.report.weights.tolist() == [0.5, 0.0]
    assert optimizer.report.gramian[0].tolist() == [0.0, 0.0]
    assert w.grad.tolist() == [0.0, 0.0]
    assert w.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("scaled", ["ce", "kd", "both"])
def test_any_scale(way, scale, scaled):
    model, reference = two_models()
    drop_dropout(model)
    drop_dropout(reference)
    x = torch.randn(32, 6)
    of_ce, of_kd = (scale if scaled != "kd" else 1.0), (scale if scaled != "ce" else 1.0)
    optimizer, exact = wrapped(model), wrapped(reference, collector="stacked")
    optimizer.backward({"ce": anchor(model(x)) * of_ce}, probe=lambda: {"kd": finish(way, mutual(model, x) * of_kd)})
    exact.backward({"ce": anchor(reference(x)) * of_ce, "kd": mutual(reference, x) * of_kd})
    seen, expected = optimizer.report.gramian[0], exact.report.gramian[0]
    # Relative to |g_kd| |g_ce|, which the product itself may be much smaller than.
    size = (exact.report.gramian[0, 0] * exact.report.gramian[1, 1]).sqrt()
    assert abs(seen[1] - expected[1]) <= (1e-5 if way == FORWARD else 1e-2) * size
    assert_close(seen[0], expected[0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("micro_batches", [2, 3])
@pytest.mark.parametrize("auxiliaries", [1, 2])
def test_micro_batches_are_as_one_batch(way, micro_batches, auxiliaries):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(12, 6)
    labels = torch.arange(12) % 4

    def losses(rows, of=1):
        def probe():
            logits = model(x[rows])
            made = {"kd": logits.exp().mean() / of, "size": logits.square().mean() / of}
            return {name: finish(way, loss) for name, loss in list(made.items())[:auxiliaries]}

        return {"ce": F.cross_entropy(model(x[rows]), labels[rows]) / of}, probe

    optimizer = wrapped(model)
    for _ in range(2):  # the second time nothing of the first is left
        optimizer.zero_grad()
        main, probe = losses(slice(None))
        optimizer.backward(main, probe=probe)
        report, expected = optimizer.report, models.gradients(model)
        optimizer.zero_grad()
        parts = torch.arange(12).chunk(micro_batches)
        for rows in parts[:-1]:
            with optimizer.accumulate():
                main, probe = losses(rows, micro_batches)
                optimizer.backward(main, probe=probe)
            assert all(p.grad is None for p in model.parameters())
            with pytest.raises(RuntimeError, match="micro-batches waiting"):
                optimizer.step()
        main, probe = losses(parts[-1], micro_batches)
        optimizer.backward(main, probe=probe)
        assert (optimizer.report.collector, optimizer.report.derivative) == ("probed", way)
        assert_close(optimizer.report.weights, report.weights, **TOLERANCE[way])
        assert_close(optimizer.report.gramian[0], report.gramian[0], **TOLERANCE[way])
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, expected[name], **TOLERANCE[way])
        optimizer.step()


def test_the_anchor_alone_is_differentiated():
    model = EarlyExit()
    x, backwards = torch.randn(32, 6), []

    class Counted(Opaque):
        @staticmethod
        def backward(ctx, gradient):
            backwards.append(None)
            return gradient

    optimizer = wrapped(model)
    optimizer.backward({"ce": anchor(model(x))}, probe=lambda: {"kd": Counted.apply(mutual(model, x))})
    assert optimizer.report.derivative == DIFFERENCES
    assert backwards == []


@pytest.mark.parametrize("way", WAYS)
def test_kept_weights_need_no_probe(way):
    model, x, calls = EarlyExit(), torch.randn(32, 6), []
    optimizer = wrapped(model, update_every=3)

    def probe():
        calls.append(None)
        return {"kd": finish(way, squared(model(x)))}

    counts = []
    for _ in range(6):
        optimizer.zero_grad()
        calls.clear()
        ce = anchor(model(x))
        expected = torch.autograd.grad(ce, list(model.parameters()), retain_graph=True)
        optimizer.backward({"ce": ce}, probe=probe)
        counts.append(len(calls) > 0)
        for p, g in zip(model.parameters(), expected, strict=True):
            assert_close(p.grad, g * optimizer.report.weights[0].float())
        optimizer.step()
    assert counts == [True, False, False, True, False, False]


def test_a_closure():
    model, x = EarlyExit(), torch.randn(32, 6)
    optimizer = wrapped(model)

    def closure():
        optimizer.zero_grad()
        loss = anchor(model(x))
        optimizer.backward({"ce": loss}, probe=lambda: {"kd": squared(model(x))})
        return loss.item()

    first = optimizer.step(closure)
    for _ in range(20):
        last = optimizer.step(closure)
    assert last < first
