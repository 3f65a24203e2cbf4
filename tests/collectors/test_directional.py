"""D_k against <g_k, g_a> by autograd, in forward mode and by central differences.

The error is |D_k - <g_k, g_a>| / (|g_k| |g_a|), an error of the cosine: ``pytest -s`` shows it.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradalign.collectors.directional import DirectionalDerivatives
from gradalign.collectors.losses import check_losses

FORWARD, DIFFERENCES = "forward-mode", "central-differences"


class Opaque(torch.autograd.Function):
    """The identity, without a forward mode."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class EarlyExit(nn.Module):
    """BatchNorm and dropout between three exits that teach one another."""

    def __init__(self):
        super().__init__()
        widths = (6, 16, 16, 16)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.Tanh(), nn.Dropout(0.3)) for a, b in pairwise(widths)
        )
        self.heads = nn.ModuleList(nn.Linear(b, 4) for b in widths[1:])

    def forward(self, x):
        logits = []
        for block, head in zip(self.body, self.heads, strict=True):
            x = block(x)
            logits.append(head(x))
        return logits


def wide(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def anchor(logits):
    labels = torch.arange(len(logits[0])) % 4
    return sum(F.cross_entropy(wide(exit_logits), labels) for exit_logits in logits)


def taught(logits, teacher):
    return sum(F.kl_div(wide(student).log_softmax(-1), teacher, reduction="batchmean") for student in logits)


def by_detach(model, x):
    logits = model(x)
    return taught(logits, wide(logits[-1]).softmax(-1).detach())


def by_torch_detach(model, x):
    logits = model(x)
    return taught(logits, torch.detach(wide(logits[-1]).softmax(-1)))


def by_data(model, x):
    logits = model(x)
    return taught(logits, wide(logits[-1]).softmax(-1).data)


def mutual(model, x):
    logits = model(x)
    return sum(
        F.kl_div(wide(student).log_softmax(-1), wide(teacher).detach().softmax(-1), reduction="batchmean")
        for student in logits
        for teacher in logits
        if student is not teacher
    )


def by_no_grad(model, x):
    with torch.no_grad():
        teacher = wide(model(x)[-1]).softmax(-1)
    return taught(model(x), teacher)


def by_decorator(model, x):
    @torch.no_grad()
    def teach():
        return wide(model(x)[-1]).softmax(-1)

    return taught(model(x), teach())


def by_set_grad_enabled(model, x):
    with torch.set_grad_enabled(False):
        teacher = model(x)[-1]
        with torch.enable_grad():
            student = model(x)
    return taught(student, wide(teacher).softmax(-1))


def by_inference_mode(model, x):
    with torch.inference_mode():
        teacher = wide(model(x)[-1]).softmax(-1)
    return taught(model(x), teacher.clone())


def without_teacher(model, x):
    return sum(wide(exit_logits).square().mean() for exit_logits in model(x))


AUILIARIES = [
    by_detach,
    by_data,
    mutual,
    by_no_grad,
    by_decorator,
    by_set_grad_enabled,
    without_teacher,
]


def flat(parameters, loss):
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if part is None else part for p, part in zip(parameters, parts, strict=True)]


def dot(a, b):
    return sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True))


def assert_exact(parameters, main, auxiliary, way, bound, *, derivatives=None):
    """Assert that D_k of ``auxiliary`` along the gradient of ``main`` is what autograd says, with the same masks."""
    state = torch.get_rng_state()
    g_a = flat(parameters, main())
    torch.set_rng_state(state)
    g_k = flat(parameters, auxiliary())
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    derivatives = DirectionalDerivatives() if derivatives is None else derivatives
    made = auxiliary if way == FORWARD else lambda: Opaque.apply(auxiliary())
    D = derivatives(lambda: check_losses({"k": made()}, source="probe"), parameters, g_a)["k"]
    error = ((D - dot(g_k, g_a)).abs() / (dot(g_k, g_k) * dot(g_a, g_a)).sqrt()).item()
    print(f"{derivatives.way:20s} error {error:.1e}, bound {bound:.0e}")  # noqa: T201 - pytest -s shows it
    assert derivatives.way == way
    assert D.dtype == torch.float64
    assert error <= bound
    assert torch.equal(torch.get_rng_state(), after)


# Forward mode rounds as a backward does: measured up to 1e-7 in float32 and 1e-3 in bfloat16. Differences keep
# precision^(2/3), 2e-5 in float32 and 0.04 in bfloat16, times a constant of the model's curvature: measured here up to
# 2e-4 and 0.03.
BOUNDS = {
    (FORWARD, "float64"): 1e-12,
    (FORWARD, "float32"): 1e-5,
    (FORWARD, "bfloat16"): 1e-2,
    (FORWARD, "autocast"): 1e-2,
    (FORWARD, "autocast outside"): 1e-2,
    (DIFFERENCES, "float64"): 1e-8,
    (DIFFERENCES, "float32"): 1e-3,
    (DIFFERENCES, "bfloat16"): 0.1,
    (DIFFERENCES, "autocast"): 0.1,
    (DIFFERENCES, "autocast outside"): 0.1,
}


def trained(model, x, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        anchor(model(x)).backward()
        optimizer.step()


@pytest.mark.parametrize("steps", [0, 20])
@pytest.mark.parametrize("arithmetic", ["float64", "float32", "bfloat16", "autocast", "autocast outside"])
@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
@pytest.mark.parametrize("auxiliary", AUILIARIES)
def test_exact(auxiliary, way, arithmetic, steps):
    model, x = EarlyExit(), torch.randn(32, 6)
    trained(model, x, steps)
    if "autocast" not in arithmetic:
        dtype = getattr(torch, arithmetic)
        model, x = model.to(dtype), x.to(dtype)

    def main():
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in arithmetic):
            return anchor(model(x))

    def probe():
        with torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast"):
            return auxiliary(model, x)

    def within():
        return auxiliary(model, x)

    outside = arithmetic == "autocast outside"
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        made = within if outside else probe
        assert_exact(list(model.parameters()), main, made, way, BOUNDS[way, arithmetic])


@pytest.mark.parametrize(
    ("auxiliary", "way"),
    [
        (by_torch_detach, FORWARD),
        pytest.param(by_torch_detach, DIFFERENCES),
        pytest.param(by_inference_mode, FORWARD),
        pytest.param(by_inference_mode, DIFFERENCES),
    ],
)
def test_other_ways_to_stop_gradients(auxiliary, way):
    model, x = EarlyExit(), torch.randn(32, 6)
    assert_exact(
        list(model.parameters()), lambda: anchor(model(x)), lambda: auxiliary(model, x), way, BOUNDS[way, "float32"]
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.output = nn.Linear(8, 11)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):
        return self.output(torch.tanh(self.embedding(tokens)))


class Attention(nn.Module):
    """Fused attention, which has no forward mode of its own."""

    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(8, 3 * 8)

    def forward(self, x):
        q, k, v = self.inputs(x).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(2, 3)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body = kind(8, 6, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.body(x)[0]


def sequences():
    return torch.randn(3, 5, 8)


KINDS = {
    "tied": (Tied, lambda: torch.arange(12) % 11, FORWARD),
    "attention": (Attention, sequences, FORWARD),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), sequences, FORWARD),
    "gru": (lambda: Recurrent(nn.GRU), sequences, FORWARD),
    "lstm": (lambda: Recurrent(nn.LSTM), sequences, DIFFERENCES),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), sequences, DIFFERENCES),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 6)), sequences, FORWARD),
    "convolution": (lambda: nn.Conv1d(5, 4, 3), sequences, FORWARD),
    "scripted": (lambda: torch.jit.script(nn.Linear(8, 6)), sequences, DIFFERENCES),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.* is :DeprecationWarning")  # torch scripts a module here
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_modules(kind, forced):
    make, inputs, way = KINDS[kind]
    model, x = make(), inputs()
    way = DIFFERENCES if forced else way
    assert_exact(
        list(model.parameters()),
        lambda: model(x).exp().mean(),
        lambda: model(x).sin().mean(),
        way,
        BOUNDS[way, "float32"],
    )


def test_a_direction_that_is_all_but_zero_in_the_matrices():
    # The mean square of what LayerNorm returns is that of its gain and bias: of all else the gradient is rounding.
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), sequences()
    assert_exact(
        list(model.parameters()),
        lambda: model(x).square().mean(),
        lambda: model(x).sin().mean(),
        DIFFERENCES,
        BOUNDS[DIFFERENCES, "float32"],
    )


RAW = {
    "penalty": lambda w, v, x: w.square().sum() + v.square().sum(),
    "power": lambda w, v, x: (w**2).sum() + (3 - 2 * v).exp().sum(),
    "linear": lambda w, v, x: F.linear(x, w, v).exp().mean(),
    "linear by keyword": lambda w, v, x: F.linear(input=x, weight=w, bias=v).exp().mean(),
    "matmul": lambda w, v, x: (x @ w.T + v).exp().mean(),
    "operator": lambda w, v, x: torch.ops.aten.linear(x, w, v).exp().mean(),
    "list": lambda w, v, x: torch.cat([w, v.unsqueeze(1)], 1).exp().sum(),
    "tuple": lambda w, v, x: torch.cat((w.flatten(), v)).exp().sum(),
    "rows": lambda w, v, x: sum((row * v[0]).exp().sum() for row in w),
    "under no_grad": lambda w, v, x: (w * _frozen(w).exp()).sum() + v.sum(),
    "detached": lambda w, v, x: (w * w.detach().exp()).sum() + v.sum(),
    "data": lambda w, v, x: (w * w.data.exp()).sum() + v.sum(),
    "several": lambda w, v, x: w.square().sum() * 3,
}


def _frozen(w):
    with torch.no_grad():
        return w.clone()


@pytest.mark.parametrize("use", RAW)
@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
def test_parameters_used_by_hand(use, way):
    w, v, x = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3)), torch.randn(5, 4)
    assert_exact(
        [w, v], lambda: (x @ w.T + v).sin().mean(), lambda: RAW[use](w, v, x), way, BOUNDS[way, "float32"]
    )  # fmt: skip


class Product(torch.autograd.Function):
    """x w^T, with a forward mode."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        ctx.save_for_forward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient @ w, gradient.T @ x

    @staticmethod
    def jvp(ctx, dx, dw):
        x, w = ctx.saved_tensors
        return (0 if dx is None else dx @ w.T) + (0 if dw is None else x @ dw.T)


class ProductByBackwardAlone(Product):
    jvp = torch.autograd.Function.jvp


@pytest.mark.parametrize(
    ("function", "first", "forced"),
    [
        pytest.param(Product, False, False),
        pytest.param(Product, True, False),
        (Product, False, True),
        (Product, True, True),
        (ProductByBackwardAlone, False, False),
        pytest.param(ProductByBackwardAlone, True, False),
        (ProductByBackwardAlone, False, True),
        (ProductByBackwardAlone, True, True),
    ],
)
def test_a_function_of_the_users_that_takes_a_parameter(function, first, forced):
    x, w, v = torch.randn(16, 4), nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def auxiliary():
        hidden = function.apply(x, w) if first else function.apply(x @ v.T, w)
        loss = (hidden.tanh() @ v.T).sin().mean()
        return Opaque.apply(loss) if forced else loss

    parameters = [w, v]
    g_a = flat(parameters, ((x @ w.T).tanh() @ v.T).square().mean())
    g_k = flat(parameters, auxiliary())
    D = DirectionalDerivatives()(lambda: check_losses({"k": auxiliary()}, source="probe"), parameters, g_a)["k"]
    # Whichever way is taken: differences in float32 measure 1e-5 here.
    assert abs(D - dot(g_k, g_a)) <= 1e-3 * (dot(g_k, g_k) * dot(g_a, g_a)).sqrt()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_checkpointed(reentrant, forced):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 4))
    parameters, x = list(model.parameters()), torch.randn(8, 6)

    def auxiliary():
        hidden = model[0](x)
        loss = checkpoint(model[1:], hidden, use_reentrant=reentrant).sin().mean()
        return Opaque.apply(loss) if forced else loss

    state = torch.get_rng_state()
    g_a = flat(parameters, model(x).square().mean())
    torch.set_rng_state(state)
    auxiliary().backward()  # the reentrant one refuses torch.autograd.grad
    g_k = [p.grad for p in parameters]
    torch.set_rng_state(state)
    D = DirectionalDerivatives()(lambda: check_losses({"k": auxiliary()}, source="probe"), parameters, g_a)["k"]
    assert abs(D - dot(g_k, g_a)) <= 1e-3 * (dot(g_k, g_k) * dot(g_a, g_a)).sqrt()


def test_a_number_read_from_a_tensor_stays():
    w = nn.Parameter(torch.randn(3, 4))
    assert_exact(
        [w], lambda: w.sin().sum(), lambda: w.square().sum() * w.exp().sum().item(), FORWARD, BOUNDS[FORWARD, "float32"]
    )


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("of", ["anchor", "auxiliary", "both"])
def test_any_scale_of_the_losses(way, scale, of):
    model, x = EarlyExit(), torch.randn(32, 6)
    main_scale, scale_k = (scale if of != "auxiliary" else 1.0), (scale if of != "anchor" else 1.0)
    assert_exact(
        list(model.parameters()),
        lambda: anchor(model(x)) * main_scale,
        lambda: mutual(model, x) * scale_k,
        way,
        BOUNDS[way, "float32"],
    )


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
def test_weights_that_are_zero(way):
    w = nn.Parameter(torch.zeros(3, 4))
    x = torch.randn(5, 4)
    assert_exact([w], lambda: F.linear(x, w).sum(), lambda: F.linear(x, w).exp().sum(), way, BOUNDS[way, "float32"])


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
def test_along_nothing_it_is_zero(way):
    w = nn.Parameter(torch.randn(3, 4))
    before = w.detach().clone()
    derivatives = DirectionalDerivatives()
    make = Opaque.apply if way == DIFFERENCES else torch.clone
    D = derivatives(lambda: {"k": (make(w.exp().sum()),)}, [w], [torch.zeros(3, 4)])
    assert D["k"].item() == 0
    assert torch.equal(w, before)


def test_by_hand():
    # D = d/dt (theta + t g)^2 / 2 = <theta, g> = 3 * 2 + 4 * -1; a constant's is 0, and two terms are summed.
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    for make, rtol in ((torch.clone, 0.0), (Opaque.apply, 1e-3)):
        D = DirectionalDerivatives()(
            lambda make=make: {
                "half": (make(w.square().sum() / 2),),
                "constant": (torch.ones(()),),
                "two": (w[0].reshape(1), w[1] * 2),
            },
            [w],
            [torch.tensor([2.0, -1.0])],
        )
        expected = {"half": 2.0, "constant": 0.0, "two": 0.0}
        for name, value in expected.items():
            torch.testing.assert_close(D[name].item(), value, rtol=rtol, atol=rtol)


def test_differences_serve_other_parameters_at_every_step():
    a, b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
    derivatives = DirectionalDerivatives()
    for parameters in ([a, b], [a], [b], [a, b]):
        assert_exact(
            parameters,
            lambda parameters=parameters: sum(p.sin().sum() for p in parameters),
            lambda: a.square().sum() + b.exp().sum(),
            DIFFERENCES,
            BOUNDS[DIFFERENCES, "float32"],
            derivatives=derivatives,
        )


def test_differences_replay_a_detach_that_begins_later():
    w, derivatives = nn.Parameter(torch.randn(3)), DirectionalDerivatives()
    for auxiliary in (lambda: w.exp().sum(), lambda: torch.dot(w, w.detach().exp()), lambda: w.exp().sum()):
        assert_exact(
            [w], lambda: w.sin().sum(), auxiliary, DIFFERENCES, BOUNDS[DIFFERENCES, "float32"], derivatives=derivatives
        )


def test_differences_take_the_step_of_an_autocast_that_begins_later():
    model, x, derivatives = EarlyExit(), torch.randn(32, 6), DirectionalDerivatives()
    for enabled in (False, True):

        def auxiliary(enabled=enabled):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return without_teacher(model, x)

        assert_exact(
            list(model.parameters()),
            lambda: anchor(model(x)),
            auxiliary,
            DIFFERENCES,
            BOUNDS[DIFFERENCES, "autocast"],
            derivatives=derivatives,
        )


def test_another_number_of_detached_values_at_another_call_is_refused():
    w, calls = nn.Parameter(torch.randn(3)), iter(range(10))

    def auxiliary():
        loss = w * w.detach()
        return {"k": (Opaque.apply(loss.sum() if next(calls) < 2 else (loss * w.detach()).sum()),)}

    with pytest.raises(RuntimeError, match=r"`probe` must compute the same at every call, but it called detach"):
        DirectionalDerivatives()(auxiliary, [w], [torch.ones(3)])


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
def test_what_the_probe_sees_of_a_parameter(way):
    w = nn.Parameter(torch.randn(3))
    w.grad = torch.ones(3)
    seen = []

    def auxiliary():
        seen.append((w.requires_grad, w.is_leaf, w.grad is not None, torch.is_grad_enabled()))
        loss = (w.exp() if w.requires_grad else w * 0).sum()
        return {"k": (Opaque.apply(loss) if way == DIFFERENCES else loss,)}

    with torch.no_grad():
        DirectionalDerivatives()(auxiliary, [w], [torch.ones(3)])
    assert set(seen) == {(True, True, True, True)}
    assert w.requires_grad
    assert w.is_leaf


@pytest.mark.parametrize("way", [FORWARD, DIFFERENCES])
def test_how_often_the_probe_is_called(way):
    w, calls = nn.Parameter(torch.randn(3)), []

    def auxiliary(stops):
        calls.append(None)
        loss = (w * (w.detach() if stops else 2)).sum()
        return {"k": (Opaque.apply(loss) if way == DIFFERENCES else loss,)}

    derivatives = DirectionalDerivatives()
    counts = []
    for _ in range(2):
        calls.clear()
        derivatives(lambda: auxiliary(True), [w], [torch.ones(3)])
        counts.append(len(calls))
    # One in forward mode; one in vain, then one at theta and one at each side.
    assert counts == ([1, 1] if way == FORWARD else [4, 3])


def test_no_graph_is_kept():
    model, x = EarlyExit(), torch.randn(32, 6)
    made = []

    def auxiliary():
        made.append(without_teacher(model, x))
        return {"k": (made[-1],)}

    parameters = list(model.parameters())
    DirectionalDerivatives()(auxiliary, parameters, [torch.ones_like(p) for p in parameters])
    assert made[0].grad_fn is None
