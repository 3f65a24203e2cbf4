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
_BELOW = torch.tensor([1.3, 1.6], dtype=torch.float64)
_ABOVE = torch.tensor([-1.1, 1.6], dtype=torch.float64)
_ALPHA = 0.5
_ORIGIN = torch.zeros(2, dtype=torch.float64)
_UNDER = torch.tensor([0.0, -0.55], dtype=torch.float64)  # where a result is drawn that would hide another arrow


def arrow(axis: Axes, end: Tensor, label: str, color: str, place: tuple[float, float], start: Tensor = _ORIGIN) -> None:
    """Draw an arrow and its label, centred at a place in the axes' own units."""
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 2.4, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 17}
    axis.annotate("", xy=tuple(end.tolist()), xytext=tuple(start.tolist()), arrowprops=style)
    axis.text(*place, label, color=color, fontsize=13, ha="center", va="center")


def dotted(axis: Axes, start: Tensor, end: Tensor) -> None:
    """Draw the line along which a gradient is projected."""
    axis.plot(*zip(start.tolist(), end.tolist(), strict=True), color="grey", linestyle=":", linewidth=1.6)


def aligned(axis: Axes, kd: Tensor) -> None:
    """Draw GA-soft: the projection on g_CE, and below it the result, for it lies on g_CE too."""
    J = torch.stack([_CE, kd])
    projection = (kd @ _CE) / (_CE @ _CE) * _CE
    result = J.T @ GASoft(_ALPHA)(J @ J.T)
    dotted(axis, kd, projection)
    arrow(axis, _CE, "$g_{CE}$", "tab:blue", (2.2, 0.28))
    arrow(axis, kd, "$g_{KD}$", "tab:orange", (float(kd[0]), float(kd[1]) + 0.24))
    arrow(axis, projection, "projection $g^P_{KD}$", "tab:red", (float(projection[0]) / 2, -0.28))
    arrow(axis, _UNDER + result, "result $d$", "tab:green", (float(result[0]) / 2, -0.85), start=_UNDER)


def pcgrad(axis: Axes) -> None:
    """Draw PCGrad: each gradient without its component along the other, and the sum."""
    J = torch.stack([_CE, _ABOVE])
    G = J @ J.T
    ce, kd = (J[i] - G[0, 1] / G[1 - i, 1 - i] * J[1 - i] for i in (0, 1))
    dotted(axis, _CE, ce)
    dotted(axis, _ABOVE, kd)
    arrow(axis, _CE, "$g_{CE}$", "tab:blue", (2.2, -0.28))
    arrow(axis, _ABOVE, "$g_{KD}$", "tab:orange", (-1.1, 1.84))
    arrow(axis, ce, "$g'_{CE}$", "tab:cyan", (float(ce[0]) + 0.34, float(ce[1]) + 0.06))
    arrow(axis, kd, "$g'_{KD}$", "tab:purple", (-0.05, 1.84))
    result = J.T @ PCGrad()(G)
    arrow(axis, result, "result $d$", "tab:green", (float(result[0]), float(result[1]) + 0.24))


def main() -> None:
    """Write the figure."""
    figure = Figure(figsize=(12.6, 4.1), layout="constrained")
    FigureCanvasAgg(figure)
    below, above, other = figure.subplots(1, 3)
    aligned(below, _BELOW)
    aligned(above, _ABOVE)
    pcgrad(other)
    titles = ("GA, angle ≤ 90°", "GA-soft, angle > 90°", "PCGrad, angle > 90°")
    for axis, title in zip((below, above, other), titles, strict=True):
        axis.set(xlim=(-1.6, 2.7), ylim=(-1.05, 3.2), aspect="equal")
        axis.set_title(title, fontsize=13, y=0.99)
        axis.axis("off")
    figure.savefig(Path(__file__).parents[1] / "_static" / "projection.png", dpi=90)


if __name__ == "__main__":
    main()
