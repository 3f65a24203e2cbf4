"""The streamed collector against the stacked one, which keeps every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gradalign import GradientAligner, NonFiniteError
from gradalign.rules import GAHard, GASoft, MomentumWeights
from tests import models

WIDTH = 1200  # its square is above the number of elements that hooks leave alone


class Large(nn.Module):
    """Parameters large enough for hooks, reached by all groups, one, the others, none."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(3, WIDTH)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, 1000)
        self.unused = nn.Parameter(torch.ones(2))

    def losses(self):
        hidden = torch.tanh(self.shared(torch.tanh(self.trunk(models.inputs(4, 3)))))
        return {
            "first": F.cross_entropy(self.first(hidden), torch.arange(4)),
            "second": self.second(hidden).square().mean(),
        }


class Transposed(nn.Module):
    """A large weight that lies in memory by columns, and a large channels_last one."""

    def __init__(self):
        super().__init__()
        self.columns = nn.Parameter((torch.randn(WIDTH, WIDTH) / 30).t())
        self.convolution = nn.Conv2d(300, 256, 4).to(memory_format=torch.channels_last)

    def losses(self):
        hidden = models.inputs(3, WIDTH) @ self.columns
        image = hidden.view(3, 300, 2, 2).repeat(1, 1, 2, 2).to(memory_format=torch.channels_last)
        maps = self.convolution(image)
        return {"first": maps.square().mean(), "second": -maps.mean() + hidden.mean()}


def losses_of(model, groups):
    losses = model.losses()
    if groups > len(losses):
        losses = {**losses, "third": -sum(losses.values()).square() / 4}
    return dict(list(losses.items())[:groups])


def make(kind, rule, **options):
    model = models.make(kind)
    return model, GradientAligner(torch.optim.SGD(model.parameters(), lr=0.1), rule, **options)


def known_entries(groups, anchor):
    """Where G is seen: the diagonal, the anchor's row and column."""
    return torch.tensor([[anchor in (i, j) or i == j for j in range(groups)] for i in range(groups)])


def assert_same(one, two):
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        if b.grad is None:
            assert a.grad is None, name
        else:
            assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")
            assert a.grad.stride() == b.grad.stride(), name


def hooks_of(model):
    return [name for name, p in model.named_parameters() if p._backward_hooks]


RULES = {
    "soft": lambda anchor: GASoft(0.4, anchor=anchor),
    "hard": lambda anchor: GAHard(0.4, anchor=anchor),
    "momentum": lambda anchor: MomentumWeights(GASoft(0.4, anchor=anchor), momentum=0.5),
}


# Two rules are enough where a step takes long.
KINDS = [
    *itertools.product(models.ALL, [("soft", 0), ("soft", "last"), ("hard", 1), ("momentum", "last")]),
    *[(Large, ("soft", "last")), (Large, ("hard", 1)), (Transposed, ("momentum", 0))],
]


@pytest.mark.parametrize(("kind", "rule"), KINDS)
@pytest.mark.parametrize("granularity", ["global", "param_group", "tensor", "layers"])
@pytest.mark.parametrize("scope", ["all", "shared", "some"])
@pytest.mark.parametrize("groups", [2, 3])
def test_streamed_equals_stacked(kind, rule, granularity, scope, groups):
    name, anchor = rule
    both = []
    for collector in ("streamed", "stacked"):
        model = models.make(kind)
        names = list(losses_of(model, groups))
        model = models.make(kind)  # BatchNorm has seen one batch less
        first, *others = model.parameters()
        children = [list(m.parameters()) for m in list(model.children())[:2]]
        blocks = {"layers": children or [[first]]}.get(granularity, granularity)
        some = [first, others[0]] if scope == "some" else scope
        made = RULES[name](names[-1] if anchor == "last" else anchor)
        inner = torch.optim.SGD([{"params": [first]}, {"params": others}], lr=0.1)
        optimizer = GradientAligner(inner, made, granularity=blocks, scope=some, collector=collector)
        for _ in range(1 if kind in (Large, Transposed) else 2):  # the second adds to p.grad of the first
            optimizer.backward(losses_of(model, groups))
        both.append((model, optimizer.report))
    (model, streamed), (reference, stacked) = both
    assert (streamed.collector, stacked.collector) == ("streamed", "stacked")
    assert_same(model, reference)
    close = {"rtol": 1e-5, "atol": 1e-9}  # of float32 gradients that two backwards made
    assert_close(streamed.weights, stacked.weights, **close)
    seen = known_entries(groups, groups - 1 if anchor == "last" else anchor).expand_as(streamed.gramian)
    assert_close(streamed.gramian[seen], stacked.gramian[seen], **close)
    assert streamed.gramian[~seen].isnan().all()
    assert not hooks_of(model)


def test_every_way_to_reach_a_parameter_by_hand():
    # Gradients in (shared, lead, alone): anchor (1, 2, 0), auxiliaries (3, 0, 4) and (-1, 0, 5).
    shared, lead, alone, nothing = parameters = [nn.Parameter(torch.ones(())) for _ in range(4)]
    optimizer = GradientAligner(torch.optim.SGD(parameters), GASoft(0.5), collector="streamed")
    optimizer.backward({"a": shared + 2 * lead, "b": 3 * shared + 4 * alone, "c": -shared + 5 * alone})
    G = optimizer.report.gramian
    assert G[0].tolist() == [5, 3, -1]
    assert G[:, 0].tolist() == [5, 3, -1]
    assert G.diagonal().tolist() == [5, 25, 26]
    assert G[1, 2].isnan()
    # .5 + .5 * (3 - 1) / 5 = .7
    assert [p.grad if p.grad is None else round(p.grad.item(), 6) for p in parameters] == [0.7, 1.4, 0, None]
    assert nothing.grad is None


def test_only_shared_parameters_by_hand():
    # As above, and "alone" is reached by two auxiliaries, "one" by one of them: plain weights .5, .5, .5.
    parameters = [nn.Parameter(torch.ones(())) for _ in range(4)]
    shared, lead, alone, one = parameters
    optimizer = GradientAligner(torch.optim.SGD(parameters), GASoft(0.5), collector="streamed", scope="shared")
    optimizer.backward({"a": shared + 2 * lead, "b": 3 * shared + 4 * alone + 8 * one, "c": -shared + 5 * alone})
    G = optimizer.report.gramian
    assert G[0].tolist() == [1, 3, -1]
    assert G.diagonal().tolist() == [1, 9 + 16, 1 + 25]
    # .5 + .5 * (3 - 1) / 1 = 1.5; 2 and 8 at their plain weight .5; what auxiliaries share has no anchor to follow
    assert [p.grad.item() for p in parameters] == [1.5, 1, 0, 4]


def test_auto_is_streamed_for_rules_that_rescale_their_anchor_alone():
    for rule, collector in (("ga-soft", "streamed"), ("ga-hard", "streamed"), ("pcgrad", "stacked")):
        model, optimizer = make(models.TwoHeads, rule)
        optimizer.backward(model.losses())
        assert optimizer.report.collector == collector
    with pytest.raises(ValueError, match=r"`collector` must be 'stacked' or 'auto' with PCGrad.*, got 'streamed'"):
        make(models.TwoHeads, "pcgrad", collector="streamed")


@pytest.mark.parametrize("kind", [models.TwoHeads, Large])
def test_adds_to_what_is_in_grad(kind):
    model, optimizer = make(kind, GASoft(0.4), collector="streamed")
    reference, plain = make(kind, GASoft(0.4), collector="stacked")
    plain.backward(reference.losses())
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    kept = [p.grad for p in model.parameters()]
    optimizer.backward(model.losses())
    for p, q, before in zip(model.parameters(), reference.parameters(), kept, strict=True):
        assert p.grad is before
        assert_close(p.grad, torch.full_like(p, 3.0) + (0.0 if q.grad is None else q.grad))


@pytest.mark.parametrize("kind", [models.TwoHeads, Large])
def test_hooks_of_the_user_see_and_change_each_gradient(kind):
    seen = {}
    for collector in ("streamed", "stacked"):
        model, optimizer = make(kind, GASoft(0.4), collector=collector)
        weight = next(p for n, p in model.named_parameters() if n.endswith(("trunk.weight", "shared.weight")))
        calls = seen[collector] = []

        def double(gradient, calls=calls):
            calls.append(gradient.clone())
            return 2 * gradient

        weight.register_hook(double)
        written = []
        weight.register_post_accumulate_grad_hook(lambda p, written=written: written.append(p.grad.clone()))
        optimizer.backward(model.losses())
        assert len(calls) == 2
        assert torch.equal(*written, weight.grad)
        calls.append(weight.grad)
        calls.append(optimizer.report.gramian)
    for streamed, stacked in zip(seen["streamed"], seen["stacked"], strict=True):
        assert_close(streamed, stacked)


@pytest.mark.parametrize("rows", [5, 1100])
@pytest.mark.parametrize("broken", ["anchor", "auxiliary"])
@pytest.mark.parametrize("collector", ["streamed", "stacked"])
def test_a_sparse_gradient_leaves_nothing_behind(rows, broken, collector):
    torch.manual_seed(1)
    table, weight = nn.Embedding(rows, 1000, sparse=True), nn.Parameter(torch.ones(1000))
    optimizer = GradientAligner(torch.optim.SGD([*table.parameters(), weight]), GASoft(0.5), collector=collector)
    sparse, dense = table(torch.tensor([1, 2])).sum() + weight.sum(), weight.square().sum()
    weight.grad = torch.full_like(weight, 7.0)
    losses = {"a": sparse, "b": dense} if broken == "anchor" else {"a": dense, "b": sparse}
    with pytest.raises(
        ValueError,
        match=rf"`losses\['{'a' if broken == 'anchor' else 'b'}'\]` must have dense gradients, got a torch.sparse_coo"
        rf" one for a parameter of shape \({rows}, 1000\)",
    ):
        optimizer.backward(losses)
    assert not table.weight._backward_hooks
    assert table.weight.grad is None
    assert (weight.grad == 7.0).all()
    optimizer.zero_grad()
    optimizer.backward({"a": weight.sum(), "b": 3 * weight.sum() + table.weight.sum()})
    assert_close(weight.grad, torch.full_like(weight, 2.0))  # .5 + .5 * 3
    assert_close(optimizer.report.gramian.diagonal().tolist(), [1000.0, 9000.0 + 1000 * rows])


@pytest.mark.parametrize("kind", [models.TwoHeads, Large])
@pytest.mark.parametrize("lost", ["first", "second"])
def test_a_group_that_reaches_nothing_leaves_nothing_behind(kind, lost):
    model, optimizer = make(kind, GASoft(0.4), collector="streamed")
    losses = {**model.losses(), lost: nn.Parameter(torch.ones(())).square()}
    with pytest.raises(ValueError, match=rf"`losses\['{lost}'\]` must reach a parameter of the optimizer"):
        optimizer.backward(losses)
    assert not hooks_of(model)
    assert all(p.grad is None for p in model.parameters())
    optimizer.backward(model.losses())
    reference, plain = make(kind, GASoft(0.4), collector="stacked")
    plain.backward(reference.losses())
    assert_same(model, reference)


def test_an_error_in_a_hook_of_the_user_leaves_nothing_behind():
    model, optimizer = make(Large, GASoft(0.4), collector="streamed")
    calls = []

    def fail(gradient):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("mine")

    handle = model.trunk.weight.register_hook(fail)
    with pytest.raises(KeyError, match="mine"):
        optimizer.backward(model.losses())
    handle.remove()
    assert not hooks_of(model)
    optimizer.backward(model.losses())
    reference, plain = make(Large, GASoft(0.4), collector="stacked")
    plain.backward(reference.losses())
    assert_same(model, reference)


@pytest.mark.parametrize("kind", [models.TwoHeads, Large])
@pytest.mark.parametrize("scope", ["all", "shared", "some"])
@pytest.mark.parametrize("bad", ["first", "second"])
def test_it_sees_what_is_not_finite(kind, scope, bad):
    model = models.make(kind)
    chosen = [model.trunk.weight] if scope == "some" else scope
    optimizer = GradientAligner(torch.optim.SGD(model.parameters()), GASoft(0.4), scope=chosen, collector="streamed")
    losses = model.losses()
    with pytest.raises(NonFiniteError, match=f"'{bad}'") as caught:
        optimizer.backward({**losses, bad: losses[bad] * torch.nan})
    assert caught.value.groups == (bad,)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("collector", ["auto", "streamed"])
def test_micro_batches_are_stacked_and_equal_one_large_batch(collector):
    def losses(model, rows):
        hidden = torch.tanh(model.trunk(models.inputs(6, 5)[rows]))
        return {"first": model.first(hidden).square().mean(), "second": -(model.second(hidden).exp()).mean()}

    whole, one = make(models.TwoHeads, GASoft(0.4), collector=collector)
    one.backward(losses(whole, slice(0, 6)))
    assert one.report.collector == "streamed"
    model, optimizer = make(models.TwoHeads, GASoft(0.4), collector=collector)
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.accumulate():
            optimizer.backward({k: v / 2 for k, v in losses(model, slice(0, 3)).items()})
        optimizer.backward({k: v / 2 for k, v in losses(model, slice(3, 6)).items()})
        assert optimizer.report.collector == "stacked"
        assert_same(model, whole)
        optimizer.zero_grad()
        optimizer.backward(losses(model, slice(0, 6)))  # and streamed again after
        assert optimizer.report.collector == "streamed"
        assert_same(model, whole)


@pytest.mark.parametrize("n", [3, WIDTH])
@pytest.mark.parametrize("scope", ["all", "some"])
def test_gradients_that_others_hold_are_not_changed(n, scope):
    a, b, c, d = parameters = [nn.Parameter(torch.ones(n, n)) for _ in range(4)]
    C = torch.arange(float(n * n)).view(n, n) % 5
    kept = C + 1
    optimizer = GradientAligner(
        torch.optim.SGD(parameters), GASoft(0.5), scope=[d] if scope == "some" else scope, collector="streamed"
    )
    # Autograd gives a and b one tensor, and c what the function keeps, of the anchor as of the auxiliary.
    anchor = ((a + b) * C).sum() + models.Remembered.apply(c, kept) + d.sum()
    optimizer.backward({"a": anchor, "b": 3 * ((a + b) * C).sum() + models.Remembered.apply(c, kept) + 5 * d.sum()})
    assert torch.equal(kept, C + 1)
    weight = optimizer.report.weights[0].item()
    if scope == "some":
        assert weight == 3  # .5 + .5 * 5
        expected = [0.5 * C + 1.5 * C, 0.5 * C + 1.5 * C, kept, torch.full((n, n), 3.0)]
    else:
        expected = [weight * C, weight * C, weight * kept, torch.full((n, n), weight)]
    for p, gradient in zip(parameters, expected, strict=True):
        assert_close(p.grad, gradient)
    a.grad.fill_(0.0)
    assert_close(b.grad, expected[1])


class Peak(TorchDispatchMode):
    """Counts the large tensors that are alive at once, of those that operations return while it is entered."""

    def __init__(self, besides):
        super().__init__()
        self._besides = {tensor.untyped_storage()._cdata for tensor in besides}
        self._alive = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().nbytes() >= 4 * WIDTH * WIDTH:
                storage = made.untyped_storage()
                if storage._cdata not in self._besides:
                    self._alive[storage._cdata] = StorageWeakRef(storage)
        self._alive = {key: reference for key, reference in self._alive.items() if not reference.expired()}
        self.most = max(self.most, len(self._alive))
        return out


class Deep(nn.Module):
    """Six large layers, and three losses that reach them all."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def losses(self):
        hidden = models.inputs(2, WIDTH)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return {"first": hidden.square().mean(), "second": hidden.mean(), "third": -hidden.exp().mean()}


@pytest.mark.parametrize(
    ("collector", "least", "most"),
    # The anchor's six, the one that backward makes, and a copy of it where its strides differ; or all groups' six.
    [("streamed", 6, 6 + 2), ("stacked", 3 * 6, 3 * 6 + 2)],
)
def test_no_second_gradient_is_held(collector, least, most):
    model, optimizer = make(Deep, GASoft(0.4), collector=collector)
    losses = model.losses()
    with Peak(besides=model.parameters()) as peak:
        optimizer.backward(losses)
    assert least <= peak.most <= most


def test_what_is_reached_may_keep_changing():
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(12))
    optimizer = GradientAligner(torch.optim.SGD(layers.parameters(), lr=0.1), GASoft(0.5))
    plans = []
    for step in range(400):
        dropped = {(step * 7 + k * step) % 12 for k in range(4)}
        h = torch.ones(2, 3)
        for k, layer in enumerate(layers):
            h = h if k in dropped else layer(h).tanh()
        optimizer.zero_grad()
        optimizer.backward({"a": h.sum(), "b": h.square().sum()})
        collector = optimizer._steps.pool.current
        plans.append(len(collector._plans) + len(collector._sums))
    assert max(plans) <= 2 * (4 * 24 + 64)
