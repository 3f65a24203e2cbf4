"""Small convex programs on Gramians: exact, batched, on the device of their input, without waiting for it.

Shapes: G is (..., K, K), symmetric positive semi-definite up to rounding; vectors are (..., K). Every leading index is
a program of its own. All arithmetic is in float64, on cosines: rows are scaled to unit length first, so that gradients
whose norms differ by many orders of magnitude are treated alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradalign.active_set import SIGN, NonnegativeProgram, positive_ridge
from gradalign.algebra import cosines, quadratic, rounding, times, wide

_USUAL_STEPS = 10
_NEWTON_STEPS = 64  # 6 to 10 are usual; nearly stationary losses need one more for each doubling of the weights
_LAST_CHANGE = 1e-9  # of a weight, relative, in the last step of Newton's method: its square is left
_INSIDE = 0.99  # of the way to the bound w = 0 that a step may take at most


def dual_cone_projection(G: Tensor, u: Tensor) -> Tensor:
    """Return argmin of v'Gv over v >= u.

    J'v is then the projection of J'u onto the dual cone of the rows, {d : Jd >= 0}: Gv >= 0, and v_i > u_i only where
    (Gv)_i = 0. Where G is singular v is not unique, J'v is.

    Args:
        G: (..., K, K), floating.
        u: (..., K), finite; its leading dimensions broadcast with those of G.

    Returns:
        v, in float64.

    References:
        Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS 2017, arXiv:1706.08840, Eq. 11.

    >>> dual_cone_projection(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]), torch.tensor([1.0, 0.0]))  # (1, 1/4)
    tensor([1.0000, 0.2500], dtype=torch.float64)
    """
    G, u = wide(G), wide(u)
    C, norms, inverse = cosines(G)
    x = _nonnegative(C, -times(C, u * norms))
    return u + x * inverse


def min_norm_in_simplex(G: Tensor) -> Tensor:
    """Return argmin of w'Gw over the simplex, w >= 0 and sum w = 1.

    J'w is the vector of least norm in the convex hull of the rows: (Gw)_i >= w'Gw. Where G is singular w is not
    unique, J'w is.

    Args:
        G: (..., K, K), floating.

    Returns:
        w (..., K), in float64.

    >>> min_norm_in_simplex(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]))
    tensor([0.6000, 0.4000], dtype=torch.float64)
    """
    G = wide(G)
    C, norms, inverse = cosines(G)
    zero = norms == 0
    # With z = J'w / w'Gw the conditions read Jz >= 1: least norm again, a program without the sum. Where the hull
    # holds the origin no such z exists; the ridge then lets x grow along the w with J'w = 0, and w is its direction.
    shortest = torch.where(zero, torch.inf, norms).amin(-1, keepdim=True)
    x = _nonnegative(C, torch.where(zero, 0.0, shortest * inverse)) * (shortest * inverse)
    x = torch.where(zero.any(-1, keepdim=True), zero.to(G.dtype), x)  # a zero row is the least norm itself
    return x / x.sum(-1, keepdim=True)


def nonnegative_quadratic(H: Tensor, f: Tensor) -> Tensor:
    """Return argmin of x'Hx / 2 - f'x over x >= 0.

    Args:
        H: (..., K, K), floating, symmetric positive semi-definite up to rounding. A row of zeros gets x = 0.
        f: (..., K). Where the program has no minimum, x is long, finite, and falls in its direction.

    Returns:
        x (..., K), in float64.
    """
    H, f = wide(H), wide(f)
    C, _, inverse = cosines(H)
    return _nonnegative(C, f * inverse) * inverse


def best_move_in_ball(G: Tensor, p: Tensor, c: float) -> Tensor:
    """Return the x >= 0 with which d = J'(p + x) has the greatest min_i <g_i, d> of all d within c norm(J'p) of J'p.

    It is the least move that gives every <g_i, d> a margin m, at the m that takes it to the ball's border; the distance
    is convex in m, so that Newton's method comes down to it from above. Where no margin above 0 can be had, it is the
    least move that has the margin 0, which may stay inside, or lie outside: then the margin is below 0.

    Args:
        G: (..., K, K), floating.
        p: (..., K), >= 0.
        c: In [0, 1].

    Returns:
        x (..., K), in float64.
    """
    G, p = wide(G), wide(p).expand(G.shape[:-1])
    C, norms, inverse = cosines(G)
    products = times(C, p * norms)  # <g_0, g_i> / norm(g_i), g_0 = J'p
    square = (p * norms * products).sum(-1, keepdim=True)
    some = square > rounding(G) * (p * norms).sum(-1, keepdim=True).square()  # else J'p = 0 as far as G tells
    radius = c * square.where(some, 0.0).sqrt()
    # In the ball <g_i, d> is at most norm(g_i) (products_i + radius).
    margin = torch.where(norms > 0, norms * (products + radius), 0.0).amin(-1, keepdim=True)
    ceiling = torch.where(norms > 0, torch.inf, 0.0).amin(-1, keepdim=True)  # a zero row's margin is 0
    x, least = torch.zeros_like(p), NonnegativeProgram(C, p.shape[:-1])
    for _ in range(_NEWTON_STEPS // 2):
        x = least(margin * inverse - products, corrected=False)
        # Where some w >= 0 has J'w = 0 no margin can be had, but rounding grants one, at the price of an endless x.
        endless = rounding(G) * (x * norms.sign()).sum(-1, keepdim=True).square() > radius.square()
        endless = endless & (margin > 0)
        ceiling = torch.where(endless, ceiling.clamp(max=0.0), ceiling)
        distance = quadratic(C, x).sqrt()
        slope = (x * inverse).sum(-1, keepdim=True)  # of the squared distance in the margin, halved
        moving = ((distance - radius).abs() > SIGN * radius) & (slope > 0)
        moving = moving & ((margin < ceiling) | (distance > radius)) | endless
        lower = margin - (distance - radius) * distance / slope
        margin = torch.where(moving, torch.where(endless, 0.0, lower.minimum(ceiling)), margin)
        if G.device.type == "cpu" and not bool(moving.any()):
            break
    x = least(margin * inverse - products)
    return torch.where(radius > 0, x * inverse, 0.0)


def project_onto_simplex(w: Tensor) -> Tensor:
    """Return the nearest point (..., K) of the simplex, by sorting.

    References:
        Held, Wolfe and Crowder, Validation of subgradient optimization, Mathematical Programming 6, 1974.
    """
    w = w - w.amax(-1, keepdim=True)  # the same point, without the rounding of large numbers
    counts = torch.arange(1, w.shape[-1] + 1, dtype=w.dtype, device=w.device)
    # With the k largest left positive each of them loses this; the right k loses most.
    losses = (w.sort(-1, descending=True).values.cumsum(-1) - 1) / counts
    return (w - losses.amax(-1, keepdim=True)).clamp(min=0)


def fair_weights(G: Tensor, exponent: float) -> Tensor:
    """Return the w > 0 with G w = w^(-exponent), by Newton's method.

    The equation is the condition of a minimum of w'Gw / 2 - sum_i phi(w_i), phi' = w^(-exponent), which is convex.

    Args:
        G: (..., K, K), floating. A zero row gets w = 0.
        exponent: > 0.

    Returns:
        w (..., K), in float64. Where no solution exists, for some u >= 0 has Gu = 0, w is long and finite.
    """
    G = wide(G)
    C, norms, inverse = cosines(G)
    C = C + torch.diag_embed(positive_ridge(C).expand_as(norms))
    # With w_i = x_i / norm_i and norms in units of the longest, up to a power of that unit: Cx = b x^(-exponent).
    unit = norms.amax(-1, keepdim=True)
    unit = unit.where(unit > 0, 1.0)
    b = torch.where(norms > 0, norms / unit, 1.0).pow(exponent - 1)
    x = b.pow(1 / (1 + exponent))  # the solution for orthogonal rows
    done, magnitudes = torch.zeros_like(unit, dtype=torch.bool), C.abs()
    for n in range(_NEWTON_STEPS):
        pull = b * x.pow(-exponent)
        slope = times(C, x) - pull
        if n >= _USUAL_STEPS:  # before, it is the change that tells
            done = done | (slope.abs() <= 2 * SIGN * (times(magnitudes, x) + pull)).all(-1, keepdim=True)
        if x.device.type == "cpu" and bool(done.all()):
            break
        hessian = C + torch.diag_embed(exponent * pull / x)
        step = torch.linalg.solve_ex(hessian, -slope.unsqueeze(-1)).result.squeeze(-1)
        step = step * (_INSIDE / (-step / x).amax(-1, keepdim=True).clamp(min=_INSIDE))
        moved = torch.where(done, x, _advance(C, b, exponent, x, step, (slope * step).sum(-1, keepdim=True)))
        done = done | ((step / x).abs().amax(-1, keepdim=True) <= _LAST_CHANGE)
        x = moved
    return x * inverse * unit.pow((exponent - 1) / (exponent + 1))


def _advance(C: Tensor, b: Tensor, exponent: float, x: Tensor, step: Tensor, slope: Tensor) -> Tensor:
    """Return x + s step for the largest s of 1, 1/2, .. at which the objective does not climb too steeply.

    That is, more than half as steeply as it falls at s = 0, by ``slope``.
    """

    def climbs(y: Tensor, step: Tensor) -> Tensor:
        return ((times(C, y) - b * y.pow(-exponent)) * step).sum(-1, keepdim=True) > -slope / 2

    whole = x + step
    if x.device.type == "cpu" and not bool(climbs(whole, step).any()):
        return whole
    chosen = x
    for halvings in reversed(range(12)):
        y = x + step * 0.5**halvings
        chosen = torch.where(climbs(y, step), chosen, y)
    return chosen


def _nonnegative(C: Tensor, f: Tensor) -> Tensor:
    """Return argmin of x'Cx / 2 - f'x over x >= 0, for C with a unit diagonal."""
    return NonnegativeProgram(C, torch.broadcast_shapes(C.shape[:-2], f.shape[:-1]))(f)
