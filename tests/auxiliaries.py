"""Auxiliary losses that stop gradients in every way there is, and D_k held against <g_k, g_a> by autograd.

The error is |D_k - <g_k, g_a>| / (|g_k| |g_a|), an error of the cosine: ``pytest -s`` shows it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from gradalign import GradientAligner
from gradalign.collectors.directional import DirectionalDerivatives
from gradalign.collectors.losses import check_losses
from gradalign.rules import GASoft

WAYS = FORWARD, DIFFERENCES = "forward-mode", "central-differences"


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


def by_no_grad_on_activations(model, x):
    logits = model(x)
    with torch.no_grad():
        teacher = wide(logits[-1]).softmax(-1)
        teacher = teacher / teacher.sum(-1, keepdim=True)
    return taught(logits, teacher)


def by_detach_in_place(model, x):
    logits = model(x)
    teacher = wide(logits[-1]).softmax(-1) + 0
    teacher.detach_()
    return taught(logits, teacher)


def by_detach_and_then_in_place(model, x):
    teacher = wide(model(x)[-1]).detach()
    teacher /= 2
    return taught(model(x), teacher.softmax(-1))


def by_a_number(model, x):
    logits = model(x)
    return sum(wide(exit_logits).square().mean() * wide(exit_logits).square().mean().item() for exit_logits in logits)


def without_teacher(model, x):
    return sum(wide(exit_logits).square().mean() for exit_logits in model(x))


AUXILIARIES = [
    by_detach,
    by_data,
    mutual,
    by_no_grad,
    by_decorator,
    by_set_grad_enabled,
    by_no_grad_on_activations,
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


def wrapped(model, rule=None, lr=0.1, **options):
    """Return an aligner of SGD on a network, by GA-soft unless another rule is given."""
    return GradientAligner(torch.optim.SGD(model.parameters(), lr=lr), rule or GASoft(0.4), **options)


def finish(way, loss):
    """Return the loss such that it is differentiated in this way."""
    return Opaque.apply(loss) if way == DIFFERENCES else loss
