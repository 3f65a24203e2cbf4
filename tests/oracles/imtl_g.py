"""IMTL-G: Liu et al. 2021, Towards Impartial Multi-task Learning (ICLR), Section 3.1 and Appendix A."""

from __future__ import annotations

import torch


def aligned_gradient(J):
    """The closed form: a_2..a_K = g_1 U' (D U')^-1 with rows g_1 - g_i in D and u_1 - u_i in U, a_1 = 1 - their sum.

    None where the gradients are dependent: then D U' is singular, or the projections are equal for being all 0, d = 0.
    """
    units = J / J.norm(dim=1, keepdim=True).clamp(min=1e-300)
    if torch.linalg.matrix_rank(units, rtol=1e-6) < len(J):
        return None
    if len(J) == 1:
        return J[0].clone()
    D = J[:1] - J[1:]
    U = units[:1] - units[1:]
    others = torch.linalg.solve((D @ U.T).T, U @ J[0])
    return (1 - others.sum()) * J[0] + others @ J[1:]


def common_direction(J):
    """The vector whose projections on all unit gradients come nearest to one number, 1, the shortest of such vectors.

    Where the gradients are independent it has equal projections in earnest, and is parallel to the closed form.
    """
    norms = J.norm(dim=1, keepdim=True)
    units = J / norms.where(norms > 0, 1.0)
    return torch.linalg.pinv(units, rtol=1e-10) @ (norms[:, 0] > 0).to(J.dtype)
