"""What backward writes into p.grad: against plain autograd, and against rules on raw gradients."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gradalign import GradientAligner, rules
from gradalign.rules import Constant, GAHard, GASoft, PCGrad
from tests import models


def aligner(model, rule, **options):
    return GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule, **options)


def plain_gradients(kind, weights=None):
    """What ``loss.backward()`` on the (weighted) sum of the losses leaves in ``p.grad``."""
    model = models.make(kind)
    losses = model.losses().values()
    sum(w * loss for w, loss in zip(weights or [1.0] * len(losses), losses, strict=True)).backward()
    return models.gradients(model)


def assert_same_gradients(model, expected):
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
        else:
            assert_close(parameter.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")
            assert parameter.grad.stride() == expected[name].stride(), name


@pytest.mark.parametrize("kind", models.ALL)
@pytest.mark.parametrize("granularity", ["global", "param_group", "tensor", "layers"])
@pytest.mark.parametrize("scope", ["all", "shared", "some"])
@pytest.mark.parametrize("collector", ["auto", "stacked"])
def test_sum_equals_plain_backward(kind, granularity, scope, collector):
    model = models.make(kind)
    blocks = [list(m.parameters()) for m in list(model.children())[:2]] if granularity == "layers" else granularity
    some = list(model.parameters())[:2] if scope == "some" else scope
    aligner(model, "sum", granularity=blocks, scope=some, collector=collector).backward(model.losses())
    assert_same_gradients(model, plain_gradients(kind))


@pytest.mark.parametrize("kind", models.ALL)
def test_constant_equals_plain_backward_on_the_weighted_sum(kind):
    model = models.make(kind)
    weights = [0.25, 2.0, -0.5][: len(model.losses())]
    model = models.make(kind)  # BatchNorm has seen one batch less
    aligner(model, Constant(weights)).backward(model.losses())
    assert_same_gradients(model, plain_gradients(kind, weights))


def test_adds_to_what_is_in_grad():
    model = models.make(models.TwoHeads)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    kept = model.trunk.weight.grad
    aligner(model, "sum").backward(model.losses())
    expected = plain_gradients(models.TwoHeads)
    assert_close(model.trunk.weight.grad, expected["trunk.weight"] + 3.0)
    assert model.trunk.weight.grad is kept
    assert (model.unused.grad == 3.0).all()


def test_a_gradient_kept_from_an_earlier_step_never_changes():
    model = models.make(models.TwoHeads)
    optimizer = aligner(model, "sum")
    optimizer.backward(model.losses())
    kept = model.trunk.weight.grad
    copy = kept.clone()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.backward(model.losses())
    assert torch.equal(kept, copy)
    assert not torch.equal(model.trunk.weight.grad, copy)


def test_grad_can_be_used_as_torch_makes_it():
    model = models.make(models.TwoHeads)
    optimizer = aligner(model, "sum")
    optimizer.backward(model.losses())
    model.trunk.weight.grad.detach_()
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert total > 0.01
    assert_close(
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]), torch.tensor(0.01)
    )
    optimizer.zero_grad(set_to_none=False)
    assert (model.trunk.weight.grad == 0).all()


def test_losses_that_are_sequences_are_summed():
    model, expected = models.make(models.Convolutional), plain_gradients(models.Convolutional)
    losses = model.losses()
    optimizer = aligner(model, "sum")
    optimizer.backward({"ce": losses["ce"], "rest": [losses["size"], losses["z"].reshape(1)]})
    assert_same_gradients(model, expected)
    assert optimizer.report.names == ("ce", "rest")


@pytest.mark.parametrize("rule", [GASoft(0.4), GASoft(0.4, anchor="second"), GAHard(0.4), PCGrad(), "mean"])
@pytest.mark.parametrize("scope", ["all", "shared"])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("collector", ["auto", "stacked"])  # "auto" is "streamed" for GASoft and GAHard
def test_a_rule_on_raw_gradients(rule, scope, granularity, collector):
    model = models.make(models.TwoHeads)
    raw = models.raw_gradients(model, model.losses())
    optimizer = aligner(model, rule, scope=scope, granularity=granularity, collector=collector)
    optimizer.backward(model.losses())

    names = list(raw)
    fresh = rules.get(rule) if isinstance(rule, str) else rule
    shared = {n for n in raw["first"] if all(raw[k][n] is not None for k in names)}
    reached = {n for n in raw["first"] if any(raw[k][n] is not None for k in names)}
    inside = sorted(shared if scope == "shared" else reached)
    zero = {n: torch.zeros_like(p) for n, p in model.named_parameters()}

    def row(group, parameters):
        return torch.cat(
            [(raw[group][n] if raw[group][n] is not None else zero[n]).flatten() for n in parameters]
        ).double()

    for block in [inside] if granularity == "global" else [[n] for n in inside]:
        J = torch.stack([row(group, block) for group in names])
        d = J.T @ fresh(J @ J.T, names)
        actual = torch.cat([dict(model.named_parameters())[n].grad.flatten() for n in block])
        assert_close(actual, d.float())
    for n in reached - set(inside):  # outside the scope: the plain weights
        plain = fresh.plain_weights(names)
        expected = sum(w * (raw[k][n] if raw[k][n] is not None else zero[n]) for w, k in zip(plain, names, strict=True))
        assert_close(dict(model.named_parameters())[n].grad, expected)


@pytest.mark.parametrize("kind", models.ALL)
@pytest.mark.parametrize("granularity", ["global", "param_group", "tensor", "layers"])
@pytest.mark.parametrize("scope", ["all", "shared", "some"])
def test_streamed_equals_stacked(kind, granularity, scope):
    model, reference = models.make(kind), models.make(kind)
    reports = []
    for one, collector in ((model, "streamed"), (reference, "stacked")):
        blocks = [list(m.parameters()) for m in list(one.children())[:2]] if granularity == "layers" else granularity
        some = list(one.parameters())[:2] if scope == "some" else scope
        optimizer = aligner(one, GASoft(0.4), granularity=blocks, scope=some, collector=collector)
        optimizer.backward(one.losses())
        reports.append(optimizer.report)
    assert_same_gradients(model, models.gradients(reference))
    streamed, stacked = reports
    assert (streamed.collector, stacked.collector) == ("streamed", "stacked")
    assert_close(streamed.weights, stacked.weights, rtol=1e-5, atol=1e-9)  # of float32 gradients of two backwards
    assert_close(streamed.gramian[..., 0], stacked.gramian[..., 0], rtol=1e-5, atol=1e-9)
    assert streamed.gramian.isnan().any() == (len(streamed.names) > 2)


def test_report_of_a_step():
    model = models.make(models.TwoHeads)
    raw = models.raw_gradients(model, model.losses())
    optimizer = aligner(model, GASoft(0.3))
    assert optimizer.report is None
    optimizer.backward(model.losses())
    J = torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(model.parameters(), raw[k].values(), strict=True)
                ]
            )
            for k in raw
        ]
    ).double()
    assert optimizer.report.names == ("first", "second")
    assert_close(optimizer.report.gramian, J @ J.T)
    assert_close(optimizer.report.norms, J.norm(dim=1))
    assert_close(optimizer.report.cosines[0, 1], torch.cosine_similarity(J[0], J[1], dim=0))
    assert_close(optimizer.report.weights, GASoft(0.3)(J @ J.T))


def test_the_gramian_of_several_precisions_is_the_sum_of_theirs():
    model = models.make(models.MixedPrecision)
    raw = models.raw_gradients(model, model.losses())
    optimizer = aligner(model, "sum")
    optimizer.backward(model.losses())
    J = torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).double().flatten()
                    for p, g in zip(model.parameters(), raw[k].values(), strict=True)
                ]
            )
            for k in raw
        ]
    )
    assert_close(optimizer.report.gramian, J @ J.T)


def test_a_parameter_that_changes_its_shape_gets_a_new_place():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = GradientAligner(torch.optim.SGD([weight], lr=0.1), "sum")
    optimizer.backward({"a": weight.sum()})
    weight.grad = None
    weight.data = torch.ones(5, 2)
    optimizer.backward({"a": weight.sum()})
    assert torch.equal(weight.grad, torch.ones(5, 2))


def test_report_by_blocks():
    model = models.make(models.TwoHeads)
    optimizer = aligner(model, "pcgrad", granularity=[list(model.trunk.parameters()), list(model.first.parameters())])
    optimizer.backward(model.losses())
    assert optimizer.report.gramian.shape == (3, 2, 2)  # trunk, first, and the rest as a last block
    assert optimizer.report.weights.shape == (3, 2)
    assert optimizer.report.gramian[1, 1, 1] == 0  # the second loss does not reach the first head


def test_blocks_that_cover_everything_need_no_last_one():
    model = models.make(models.Recurrent)
    optimizer = aligner(
        model, "sum", granularity=[list(model.embedding.parameters()), [*model.gru.parameters(), model.output.bias]]
    )
    optimizer.backward(model.losses())
    assert optimizer.report.gramian.shape == (2, 2, 2)


def test_param_group_granularity_has_a_block_a_group():
    model = models.make(models.TwoHeads)
    inner = torch.optim.SGD(
        [{"params": model.trunk.parameters()}, {"params": [*model.first.parameters(), *model.second.parameters()]}],
        lr=0.1,
    )
    optimizer = GradientAligner(inner, "mean", granularity="param_group")
    optimizer.backward(model.losses())
    assert optimizer.report.gramian.shape == (2, 2, 2)
    assert optimizer.report.gramian[0, 0, 1] != 0
    assert optimizer.report.gramian[1, 0, 1] == 0


def test_a_parameter_that_only_a_dropped_group_reaches_gets_zeros():
    model = models.make(models.TwoHeads)
    aligner(model, GAHard(0.3)).backward(model.losses())
    assert (model.second.weight.grad == 0).all()
    assert model.unused.grad is None


def test_frozen_and_thawed_parameters():
    model = models.make(models.TwoHeads)
    model.trunk.weight.requires_grad_(False)
    optimizer = aligner(model, "sum")
    optimizer.backward(model.losses())
    assert model.trunk.weight.grad is None
    optimizer.zero_grad()
    model.trunk.weight.requires_grad_(True)
    optimizer.backward(model.losses())
    assert_same_gradients(model, plain_gradients(models.TwoHeads))


def test_groups_may_change_from_step_to_step_under_a_rule_without_memory():
    model = models.make(models.TwoHeads)
    optimizer = aligner(model, "pcgrad")
    optimizer.backward(model.losses())
    optimizer.zero_grad()
    optimizer.backward({"first": model.losses()["first"]})
    model2 = models.make(models.TwoHeads)
    model2.losses()["first"].backward()
    assert_same_gradients(model, models.gradients(model2))
    assert model.second.weight.grad is None


def test_a_row_that_was_filled_once_is_empty_again():
    model = models.make(models.TwoHeads)
    optimizer = aligner(model, "sum")
    losses = model.losses()
    optimizer.backward({"a": losses["first"], "b": losses["second"]})
    optimizer.zero_grad()
    losses = model.losses()
    optimizer.backward({"a": losses["second"], "b": losses["first"]})
    assert_same_gradients(model, plain_gradients(models.TwoHeads))
    assert optimizer.report.gramian[1, 1] == pytest.approx(
        sum(
            float(g.square().sum())
            for g in models.raw_gradients(model, model.losses())["first"].values()
            if g is not None
        )
    )


def test_a_parameter_that_no_group_reaches_any_more_keeps_none():
    model = models.make(models.TwoHeads)
    optimizer = aligner(model, "sum")
    optimizer.backward(model.losses())
    optimizer.zero_grad()
    optimizer.backward({"a": model.losses()["first"], "b": model.losses()["first"]})
    assert model.second.weight.grad is None
    assert model.first.weight.grad is not None


def test_post_accumulate_grad_hooks_run_on_what_is_written():
    model = models.make(models.TwoHeads)
    seen = []
    model.trunk.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    model.unused.register_post_accumulate_grad_hook(lambda p: seen.append(None))
    aligner(model, "ga-soft").backward(model.losses())
    (gradient,) = seen
    assert torch.equal(gradient, model.trunk.weight.grad)


def test_works_under_no_grad_and_frees_the_last_graph():
    model = models.make(models.TwoHeads)
    losses = model.losses()
    optimizer = aligner(model, "sum")
    with torch.no_grad():
        optimizer.backward(losses)
    assert_same_gradients(model, plain_gradients(models.TwoHeads))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        losses["second"].backward()


@pytest.mark.parametrize("name", ["sum", "mean", "ga-soft", "ga-hard", "pcgrad"])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_scaling_the_losses_scales_the_aligned_gradient(name, scale):
    def aligned(factor):
        model = models.make(models.TwoHeads).double()
        hidden = torch.tanh(model.trunk(models.inputs(6, 5).double()))
        losses = {
            "first": model.first(hidden).square().mean(),
            "second": -(model.second(hidden) + model.first(hidden).sum(1, keepdim=True)).mean(),
        }
        aligner(model, name).backward({k: factor * v for k, v in losses.items()})
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    degree = type(rules.get(name)).degree
    assert_close(aligned(scale) / scale**degree, aligned(1.0))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_in_float32_too(scale):
    model = models.make(models.TwoHeads)
    optimizer = aligner(model, GASoft(0.3))
    optimizer.backward(model.losses())
    expected = optimizer.report.weights
    optimizer.zero_grad()
    optimizer.backward({k: scale * v for k, v in model.losses().items()})
    assert_close(optimizer.report.weights, expected, rtol=1e-5, atol=1e-7)  # the rounding of float32 gradients
