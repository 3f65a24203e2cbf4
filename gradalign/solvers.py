"""Small convex programs on Gramians: exact, batched, on the device of their input, without waiting for it.

Shapes: G is (..., K, K), symmetric positive semi-definite up to rounding; vectors are (..., K). Every leading index is
a program of its own. All arithmetic is in float64, on cosines: rows are scaled to unit length first, so that gradients
whose norms differ by many orders of magnitude are treated alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the diagonal of a matrix of cosines, the first of them that makes it positive definite. The first is of the
# order of the rounding of G, which can leave a singular G indefinite; the others are for what is more so than that.
_RIDGES = (1e-14, 1e-12, 1e-9, 1e-6, 1e-3, 1.0, 1e3)

_NEWTON_STEPS = 64  # 6 to 10 are usual; nearly stationary losses need one more for each doubling of the weights
_ROUNDS = 12  # block pivots, of which 3 to 6 are usual, before the slow and sure method takes over
_INSIDE = 0.99  # of the way to the bound w = 0 that a step may take at most
_SIGN = 1e-14  # what counts as negative, in units of the largest number that it is a sum of


def wide(G: Tensor) -> Tensor:
    """Return G in float64 (float32 on devices that have no float64)."""
    return G.to(torch.float32 if G.device.type == "mps" else torch.float64)


def cosines(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cosines between the rows, (..., K, K), the rows' norms and their inverses, (..., K).

    A zero row is orthogonal to all others, and has the inverse 0.
    """
    norms = G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    C = (G * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)).clamp_(-1.0, 1.0)
    C.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return C, norms, inverse


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
    x = _nonnegative(C, -_times(C, u * norms))
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
    least move that has the margin 0, which may stay inside.

    Args:
        G: (..., K, K), floating.
        p: (..., K), >= 0.
        c: In [0, 1].

    Returns:
        x (..., K), in float64.
    """
    G, p = wide(G), wide(p)
    C, norms, inverse = cosines(G)
    products = _times(C, p * norms)  # <g_0, g_i> / norm(g_i), g_0 = J'p
    radius = c * (p * norms * products).sum(-1, keepdim=True).clamp(min=0).sqrt()
    # In the ball <g_i, d> is at most norm(g_i) (products_i + radius).
    margin = torch.where(norms > 0, norms * (products + radius), 0.0).amin(-1, keepdim=True)
    x = torch.zeros_like(p)
    for _ in range(_NEWTON_STEPS // 2):
        x = _nonnegative(C, margin * inverse - products)
        distance = (x * _times(C, x)).sum(-1, keepdim=True).clamp(min=0).sqrt()
        slope = (x * inverse).sum(-1, keepdim=True)  # of the squared distance in the margin, halved
        moving = ((distance - radius).abs() > _SIGN * radius) & (slope > 0)
        margin = torch.where(moving, margin - (distance - radius) * distance / slope.where(moving, 1.0), margin)
        if G.device.type == "cpu" and not bool(moving.any()):
            break
    return x * inverse


def project_onto_simplex(w: Tensor) -> Tensor:
    """Return the nearest point (..., K) of the simplex, by sorting.

    References:
        Held, Wolfe and Crowder, Validation of subgradient optimization, Mathematical Programming 6, 1974.
    """
    w = w - w.amax(-1, keepdim=True)  # the same point, without the rounding of large numbers
    ordered = w.sort(-1, descending=True).values
    excess = (ordered.cumsum(-1) - 1) / torch.arange(1, w.shape[-1] + 1, dtype=w.dtype, device=w.device)
    last = (ordered > excess).sum(-1, keepdim=True) - 1
    return (w - excess.gather(-1, last.clamp(min=0))).clamp(min=0)


def eigenvalues(G: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, ascending, and the eigenvectors by columns; of zeros where a program is not finite.

    Waits for the device on CUDA.
    """
    finite = G.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    L, V = torch.linalg.eigh(G.where(finite, 0.0))  # NaN would end the whole batch in an error
    return L, V


def rounding(G: Tensor) -> float:
    """Return what share of the largest eigenvalue of G (..., K, K), in G's dtype, can be rounding of its elements."""
    return 16 * G.shape[-1] * torch.finfo(G.dtype).eps


def solve_consistently(C: Tensor, t: Tensor, least: float) -> Tensor:
    """Return pinv(C) t, (..., K), for a symmetric positive semi-definite C of unit diagonal, in its dtype.

    Eigenvalues, and components of t along the eigenvectors, below ``least`` of the largest count as zero. Waits for the
    device on CUDA, for the eigenvalues.
    """
    L, V = eigenvalues(C)
    along = _times(V.mT, t)
    kept = (least * L[..., -1:] < L) & (along.abs() > least * t.abs().amax(-1, keepdim=True))
    return _times(V, torch.where(kept, along / L.where(kept, 1.0), 0.0))


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
    C = C + torch.diag_embed(_ridge(C).expand_as(norms))
    # With w_i = x_i / norm_i and norms in units of the longest, up to a power of that unit: Cx = b x^(-exponent).
    unit = norms.amax(-1, keepdim=True)
    unit = unit.where(unit > 0, 1.0)
    b = torch.where(norms > 0, norms / unit, 1.0).pow(exponent - 1)
    x = b.pow(1 / (1 + exponent))  # the solution for orthogonal rows
    for _ in range(_NEWTON_STEPS):
        pull = b * x.pow(-exponent)
        slope = _times(C, x) - pull
        floor = _SIGN * (_times(C.abs(), x) + pull)
        done = (slope.abs() <= floor).all(-1, keepdim=True)
        if x.device.type == "cpu" and bool(done.all()):
            break
        hessian = C + torch.diag_embed(exponent * pull / x)
        step = torch.linalg.solve_ex(hessian, -slope.unsqueeze(-1)).result.squeeze(-1)
        room = (-step / x).amax(-1, keepdim=True)
        step = step * (_INSIDE / room.clamp(min=_INSIDE))
        x = torch.where(done, x, _advance(C, b, exponent, x, step, (slope * step).sum(-1, keepdim=True)))
    return x * inverse * unit.pow((exponent - 1) / (exponent + 1))


def _advance(C: Tensor, b: Tensor, exponent: float, x: Tensor, step: Tensor, slope: Tensor) -> Tensor:
    """Return x + s step for the largest s of 1, 1/2, .. at which the objective does not climb too steeply.

    That is, more than half as steeply as it falls at s = 0, by ``slope``.
    """

    def climbs(y: Tensor, step: Tensor) -> Tensor:
        return ((_times(C, y) - b * y.pow(-exponent)) * step).sum(-1, keepdim=True) > -slope / 2

    whole = x + step
    if x.device.type == "cpu" and not bool(climbs(whole, step).any()):
        return whole
    chosen = x
    for halvings in reversed(range(12)):
        y = x + step * 0.5**halvings
        chosen = torch.where(climbs(y, step), chosen, y)
    return chosen


def _times(M: Tensor, x: Tensor) -> Tensor:
    return (M @ x.unsqueeze(-1)).squeeze(-1)


def _nonnegative(C: Tensor, f: Tensor) -> Tensor:
    """Return argmin of x'Cx / 2 - f'x over x >= 0, for C with a unit diagonal.

    With a ridge, C + r I, the program has one solution and every active set a regular matrix. One step of the proximal
    point method, x <- argmin of the program + r/2 norm(x - last x)^2, then takes the ridge's trace away, unless it
    would need another active set.
    """
    if C.shape[-1] == 1:
        return f.clamp(min=0)
    if C.shape[-1] == 2:
        return _nonnegative_pair(C[..., 0, 1], f)
    eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    ridge = _ridge(C)
    batch = torch.broadcast_shapes(C.shape[:-2], f.shape[:-1])
    f = f.expand(*batch, f.shape[-1])
    M = (C + ridge.unsqueeze(-1) * eye).expand(*batch, *C.shape[-2:])
    x, active, done = _block_pivots(M, f, eye)
    if f.device.type != "cpu":  # which of them are done is not asked: that would wait for the device
        sure = _one_by_one(M, f, eye, x)
        x, active = torch.where(done.unsqueeze(-1), x, sure), torch.where(done.unsqueeze(-1), active, sure > 0)
    elif not bool(done.all()):
        x[~done] = _one_by_one(M[~done], f[~done], eye, x[~done])
        active[~done] = x[~done] > 0
    closer = x + _solve_on(M, active, ridge * x, eye)
    holds = ~_wrong(M, active, f + ridge * x, closer).any(-1, keepdim=True)
    return torch.where(holds, closer, x).clamp(min=0)


def _nonnegative_pair(c: Tensor, f: Tensor) -> Tensor:
    """Return the minimum for K = 2 by cases, of which one holds: both positive, or one or none, the other zero."""
    c = c.unsqueeze(-1)
    both = (f - c * f.flip(-1)) / (1 - c * c).clamp(min=_RIDGES[0])
    alone = f.clamp(min=0)
    enough = c * alone >= f.flip(-1)  # the other's slack, where this one is positive alone
    one = torch.where(enough, alone, 0.0)
    # Where each is enough for the other, as for c = 1, the first one is taken.
    one = torch.stack([one[..., 0], one[..., 1].where(~enough[..., 0], 0.0)], -1)
    return torch.where((both > 0).all(-1, keepdim=True), both, one)


def _ridge(C: Tensor) -> Tensor:
    """Return the first of the ridges that makes C + r I positive definite, (..., 1)."""
    eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    if C.device.type == "cpu" and not bool(torch.linalg.cholesky_ex(C + _RIDGES[0] * eye).info.any()):
        return C.new_full((*C.shape[:-2], 1), _RIDGES[0])
    tried = torch.stack([C.new_full((), ridge) for ridge in _RIDGES])
    fits = torch.linalg.cholesky_ex(C.unsqueeze(-3) + tried[:, None, None] * eye).info == 0
    return tried.expand(fits.shape).gather(-1, fits.to(torch.int8).argmax(-1, keepdim=True))


def _solve_on(M: Tensor, active: Tensor, f: Tensor, eye: Tensor) -> Tensor:
    """Return x with M_AA x_A = f_A on the active set A, and zeros elsewhere."""
    A = torch.where(active.unsqueeze(-1) & active.unsqueeze(-2), M, eye)
    x: Tensor = torch.linalg.solve_ex(A, f.where(active, 0.0).unsqueeze(-1)).result
    return x.squeeze(-1)


def _threshold(f: Tensor, x: Tensor) -> Tensor:
    """Return what a number must be below to count as negative, (..., 1)."""
    return -_SIGN * (f.abs().amax(-1, keepdim=True) + x.shape[-1] * x.abs().amax(-1, keepdim=True))


def _wrong(M: Tensor, active: Tensor, f: Tensor, x: Tensor) -> Tensor:
    """Return where x, on the active set, or its slack Mx - f, off it, is negative."""
    return torch.where(active, x, _times(M, x) - f) < _threshold(f, x)


def _block_pivots(M: Tensor, f: Tensor, eye: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, its active set, and where it is the minimum: exchange all indices of the wrong sign at once.

    Fast, but it can go round in circles.

    References:
        Portugal, Judice and Vicente, A comparison of block pivoting and interior-point algorithms for linear least
        squares problems with nonnegative variables, Mathematics of Computation 63, 1994.
    """
    active = f > 0
    for left in reversed(range(_ROUNDS)):
        x = _solve_on(M, active, f, eye)
        wrong = _wrong(M, active, f, x)
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
    active = start > 0
    x = start.where(active, 0.0)
    for _ in range(4 * f.shape[-1] + 8):
        trial = _solve_on(M, active, f, eye)
        out = active & (trial <= 0)
        inside = ~out.any(-1, keepdim=True)
        # Go towards the trial as far as x stays nonnegative; whoever meets its bound first leaves.
        way = torch.where(out, x / (x - trial).where(out & (x > trial), 1.0), 1.0)
        shortest = way.amin(-1, keepdim=True)
        leaves = out & (way <= shortest)
        x = torch.where(inside, trial, (x + shortest * (trial - x)).clamp(min=0).masked_fill(leaves, 0.0))
        active = active & ~leaves
        slack = torch.where(active, 0.0, _times(M, x) - f)
        lowest = slack.argmin(-1, keepdim=True)
        enters = inside & (slack.gather(-1, lowest) < _threshold(f, x))
        if f.device.type == "cpu" and bool((inside & ~enters).all()):
            break
        active = active | (torch.zeros_like(active).scatter(-1, lowest, True) & enters)
    return x
