"""Nonnegative quadratic programs by active sets, x'Cx / 2 - f'x over x >= 0, for matrices of cosines.

Shapes: C is (..., K, K) with a unit diagonal, symmetric positive semi-definite up to rounding; vectors are (..., K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradalign.algebra import times

# Added to the diagonal of a matrix of cosines, the first of them that makes it positive definite. The first is of the
# order of the rounding of G, which can leave a singular G indefinite; the others are for what is more so than that.
RIDGES = (1e-14, 1e-12, 1e-9, 1e-6, 1e-3, 1.0, 1e3)

_ROUNDS = 6  # block pivots, of which 3 to 5 are usual, before the slow and sure method takes over
_CLOSED = 2  # the largest K with a closed form
SIGN = 1e-14  # what counts as negative, in units of the largest number that it is a sum of


class NonnegativeProgram:
    """argmin of x'Cx / 2 - f'x over x >= 0, for C (..., K, K) with a unit diagonal, and one f after another.

    With a ridge, C + r I, the program has one solution and every active set a regular matrix. One step of the proximal
    point method, x <- argmin of the program + r/2 norm(x - last x)^2, then takes the ridge's trace away, unless it
    would need another active set. Each f starts from the active set of the one before.
    """

    def __init__(self, C: Tensor, batch: tuple[int, ...]) -> None:
        self.C, self.active = C, torch.empty(0)
        if C.shape[-1] > _CLOSED:
            self.eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
            self.ridge = positive_ridge(C)
            self.M = (C + self.ridge.unsqueeze(-1) * self.eye).expand(*batch, *C.shape[-2:])

    def __call__(self, f: Tensor, *, corrected: bool = True) -> Tensor:
        """Return x (..., K) for f (..., K), of the program as it is or, not ``corrected``, of that with the ridge."""
        if self.C.shape[-1] <= _CLOSED:
            return f.clamp(min=0) if self.C.shape[-1] == 1 else _nonnegative_pair(self.C[..., 0, 1], f)
        M, eye = self.M, self.eye
        f = f.expand(M.shape[:-1])
        x, active, done = _block_pivots(M, f, eye, self.active if self.active.numel() else f > 0)
        if f.device.type != "cpu":  # which of them are done is not asked: that would wait for the device
            sure = _one_by_one(M, f, eye, x)
            x, active = torch.where(done.unsqueeze(-1), x, sure), torch.where(done.unsqueeze(-1), active, sure > 0)
        elif not bool(done.all()):
            x[~done] = _one_by_one(M[~done], f[~done], eye, x[~done])
            active[~done] = x[~done] > 0
        self.active = active
        if not corrected:
            return x.clamp(min=0)
        closer = x + _solve_on(M, active, self.ridge * x, eye)
        pulled = f + self.ridge * x
        holds = ~_wrong(M, active, pulled, closer, _scale(pulled)).any(-1, keepdim=True)
        return torch.where(holds, closer, x).clamp(min=0)


def _nonnegative_pair(c: Tensor, f: Tensor) -> Tensor:
    """Return the minimum for K = 2 by cases, of which one holds: both positive, or one or none, the other zero."""
    c = c.unsqueeze(-1)
    # As sums whose terms do not cancel where c is close to 1 or to -1; a ridge only where it is that.
    size, other = c.abs(), torch.where(c < 0, -f.flip(-1), f.flip(-1))
    gap = (1 - size).clamp(min=RIDGES[0])
    both = (gap * f + size * (f - other)) / (gap * (gap + 2 * size))
    alone = f.clamp(min=0)
    enough = c * alone >= f.flip(-1)  # the other's slack, where this one is positive alone
    first = torch.stack([enough[..., 0], ~enough[..., 0]], -1)
    return torch.where((both > 0).all(-1, keepdim=True), both, alone.where(first, 0.0))


def positive_ridge(C: Tensor) -> Tensor:
    """Return the first of the ridges that makes C + r I positive definite, (..., 1)."""
    eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    if C.device.type == "cpu" and not bool(torch.linalg.cholesky_ex(C + RIDGES[0] * eye).info.any()):
        return C.new_full((*C.shape[:-2], 1), RIDGES[0])
    tried = torch.stack([C.new_full((), ridge) for ridge in RIDGES])
    fits = torch.linalg.cholesky_ex(C.unsqueeze(-3) + tried[:, None, None] * eye).info == 0
    return tried.expand(fits.shape).gather(-1, fits.to(torch.int8).argmax(-1, keepdim=True))


def _solve_on(M: Tensor, active: Tensor, f: Tensor, eye: Tensor) -> Tensor:
    """Return x with M_AA x_A = f_A on the active set A, and zeros elsewhere."""
    A = torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), M, eye)
    x: Tensor = torch.linalg.solve_ex(A, f.where(active, 0.0).unsqueeze(-1)).result
    return x.squeeze(-1)


def _scale(f: Tensor) -> Tensor:
    """Return the largest magnitude of f, (..., 1)."""
    largest: Tensor = torch.linalg.vector_norm(f, torch.inf, -1, keepdim=True)
    return largest


def _negative(y: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Return where y, made of x and of numbers up to ``scale``, is below zero by more than rounding."""
    return y < -SIGN * (scale + x.shape[-1] * _scale(x))


def _wrong(M: Tensor, active: Tensor, f: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Return where x, on the active set, or its slack Mx - f, off it, is negative."""
    return _negative(torch.where(active, x, times(M, x) - f), x, scale)


def _block_pivots(M: Tensor, f: Tensor, eye: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, its active set, and where it is the minimum: exchange all indices of the wrong sign at once.

    Fast, but it can go round in circles.

    References:
        Portugal, Judice and Vicente, A comparison of block pivoting and interior-point algorithms for linear least
        squares problems with nonnegative variables, Mathematics of Computation 63, 1994.
    """
    scale = _scale(f)
    for left in reversed(range(_ROUNDS)):
        x = _solve_on(M, active, f, eye)
        wrong = _wrong(M, active, f, x, scale)
        if left == 0 or (f.device.type == "cpu" and not bool(wrong.any())):
            break
        active = active ^ wrong
    return x, active, ~wrong.any(-1)


def _one_by_one(M: Tensor, f: Tensor, eye: Tensor, start: Tensor) -> Tensor:
    """Return x, positive on its active set: let the most negative slack's index in, step back where x meets a bound.

    The objective falls with every step from the positive part of ``start``, so that no active set comes twice; at most
    about K steps are usual.

    References:
        Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23.
    """
    asks = f.device.type == "cpu"  # an accelerator is not asked what can be left out: that would wait for it
    active, scale = start > 0, _scale(f)
    x = start.where(active, 0.0)
    for _ in range(4 * f.shape[-1] + 8):
        trial = _solve_on(M, active, f, eye)
        out = active & (trial <= 0)
        inside = ~out.any(-1, keepdim=True)
        if asks and bool(inside.all()):
            x = trial
        else:
            x, active = _step_back(x, trial, active, out, inside)
            if asks and not bool(inside.any()):
                continue
        slack = torch.where(active, 0.0, times(M, x) - f)
        lowest = slack.argmin(-1, keepdim=True)
        enters = inside & _negative(slack.gather(-1, lowest), x, scale)
        if asks and not bool(enters.any()) and bool(inside.all()):
            break
        active = active.scatter(-1, lowest, active.gather(-1, lowest) | enters)
    return x


def _step_back(x: Tensor, trial: Tensor, active: Tensor, out: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return x gone towards the trial as far as it stays nonnegative, and the active set without who is first at 0."""
    way = torch.where(out, x / (x - trial).where(out & (x > trial), 1.0), 1.0)
    shortest = way.amin(-1, keepdim=True)
    leaves = out & (way <= shortest)
    x = torch.where(inside, trial, (x + shortest * (trial - x)).clamp(min=0).masked_fill(leaves, 0.0))
    return x, active & ~leaves
