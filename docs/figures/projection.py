"""Draw two gradients and what gradient alignment and PCGrad make of them: docs/_static/projection.png."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from gradalign.rules import GASoft, PCGrad

_CE = torch.tensor([2.4, 0.0], dtype=torch.float64)
_BELOW = torch.tensor([1.3, 1.5], dtype=torch.float64)
_ABOVE = torch.tensor([-1.1, 1.5], dtype=torch.float64)
_ALPHA = 0.5


def arrow(
    axis: Axes, end: Tensor, label: str, color: str, at: tuple[float, float], start: Tensor | None = None
) -> None:
    """Draw an arrow from ``start``, else the origin, and its label at a place relative to the tip."""
    begin = torch.zeros(2) if start is None else start
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 2.2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 16}
    axis.annotate("", xy=tuple(end.tolist()), xytext=tuple(begin.tolist()), arrowprops=style)
    axis.annotate(label, xy=tuple(end.tolist()), xytext=at, textcoords="offset points", color=color, fontsize=12)


def aligned(axis: Axes, kd: Tensor, title: str) -> None:
    """Draw GA-soft: the projection on g_CE, and the result a little below, for it lies on g_CE too."""
    J = torch.stack([_CE, kd])
    projection = (kd @ _CE) / (_CE @ _CE) * _CE
    result = J.T @ GASoft(_ALPHA)(J @ J.T)
    below = torch.tensor([0.0, -0.45], dtype=torch.float64)
    axis.plot(*zip(kd.tolist(), projection.tolist(), strict=True), color="grey", linestyle=":", linewidth=1.5)
    arrow(axis, _CE, "$g_{CE}$", "tab:blue", (-12, 8))
    arrow(axis, kd, "$g_{KD}$", "tab:orange", (-4, 6))
    arrow(axis, projection, "$g^P_{KD}$", "tab:red", (-14, -18) if projection[0] < 0 else (-34, 8))
    arrow(axis, result + below, r"$d = (1-\alpha)\,g_{CE} + \alpha\,g^P_{KD}$", "tab:green", (-26, -18), start=below)
    axis.set_title(title, fontsize=11)


def pcgrad(axis: Axes) -> None:
    """Draw PCGrad: each gradient without its component along the other, and the sum."""
    J = torch.stack([_CE, _ABOVE])
    G = J @ J.T
    without = [J[i] - G[0, 1] / G[1 - i, 1 - i] * J[1 - i] for i in (0, 1)]
    for gradient, left in zip(J, without, strict=True):
        axis.plot(*zip(gradient.tolist(), left.tolist(), strict=True), color="grey", linestyle=":", linewidth=1.5)
    arrow(axis, _CE, "$g_{CE}$", "tab:blue", (-10, -16))
    arrow(axis, _ABOVE, "$g_{KD}$", "tab:orange", (-6, 6))
    arrow(axis, without[0], "$g'_{CE}$", "tab:cyan", (8, -4))
    arrow(axis, without[1], "$g'_{KD}$", "tab:pink", (-30, -2))
    arrow(axis, J.T @ PCGrad()(G), "$d = g'_{CE} + g'_{KD}$", "tab:green", (-66, 6))
    axis.set_title("PCGrad, angle > 90°: the rest stays", fontsize=11)


def main() -> None:
    """Write the figure."""
    figure = Figure(figsize=(12.5, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    below, above, other = figure.subplots(1, 3)
    aligned(below, _BELOW, "GA, angle ≤ 90°: the projection adds")
    aligned(above, _ABOVE, "GA-soft, angle > 90°: it subtracts")
    pcgrad(other)
    for axis in (below, above, other):
        axis.set(xlim=(-1.7, 3.0), ylim=(-1.1, 3.1), aspect="equal")
        axis.axis("off")
    figure.savefig(Path(__file__).parents[1] / "_static" / "projection.png", dpi=90)


if __name__ == "__main__":
    main()
