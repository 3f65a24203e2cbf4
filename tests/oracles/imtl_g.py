"""IMTL-G: Liu et al. 2021, Towards Impartial Multi-task Learning (ICLR), Section 3.1 and Appendix A."""

from __future__ import annotations

import torch


def aligned_gradient(J):
    """The closed form: a_2..a_K = g_1 U' (D U')^-1 with rows g_1 - g_i in D and u_1 - u_i in U, a_1 = 1 - their sum.

    D U' has to be regular, as it is where the gradients are independent and the projections are not all 0: else None.
    """
    if not bool((J.norm(dim=1) > 0).all()):
        return None
    units = J / J.norm(dim=1, keepdim=True)
    if len(J) == 1:
        return J[0].clone()
    D = J[:1] - J[1:]
    U = units[:1] - units[1:]
    if torch.linalg.cond(U @ U.T) > 1e10 or torch.linalg.cond((D @ U.T) / J.norm(dim=1).max()) > 1e12:
        return None
    others = torch.linalg.solve((D @ U.T).T, U @ J[0])
    return (1 - others.sum()) * J[0] + others @ J[1:]


def common_direction(J):
    """The vector whose projections on all unit gradients come nearest to one number, 1, the shortest of such vectors.

    Where the gradients are independent it has equal projections in earnest, and is parallel to the closed form.
    """
    norms = J.norm(dim=1, keepdim=True)
    units = J / norms.where(norms > 0, 1.0)
    return torch.linalg.pinv(units, rtol=1e-10) @ (norms[:, 0] > 0).to(J.dtype)
