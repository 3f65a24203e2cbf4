"""D_k of what a probe may be made of: modules, parameters used by hand, functions of the user's, checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradalign.collectors.directional import DirectionalDerivatives
from gradalign.collectors.losses import check_losses
from tests.auxiliaries import BOUNDS, DIFFERENCES, FORWARD, Opaque, assert_exact, dot, flat


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
