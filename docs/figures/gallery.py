"""Draw what each rule makes of two and of three conflicting gradients: docs/_static/gallery/<rule>-gradients.png.

python docs/figures/gallery.py            every rule
python docs/figures/gallery.py cagrad     the rules named
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Wedge
from torch import Tensor

from gradalign import rules

_FOLDER = Path(__file__).parents[1] / "_static" / "gallery"
_POLAR = {2: ((2.0, 15.0), (0.9, 140.0)), 3: ((2.0, 15.0), (0.9, 115.0), (0.9, 165.0))}
"""Lengths and degrees. The first conflicts with all others, and the sum with the last; some directions with none."""

_COLORS = ("tab:blue", "tab:orange", "tab:purple")
_CALLS = 30
_ROOM = torch.tensor([[-1.9, -0.5], [2.3, 2.6]], dtype=torch.float64)
_SHORTEST = 0.02
_PARALLEL = 0.97


def gradients(count: int) -> Tensor:
    """Return two or three gradients in the plane, a row each."""
    length, degrees = torch.tensor(_POLAR[count], dtype=torch.float64).unbind(-1)
    return length[:, None] * torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], -1)


def make(name: str, count: int) -> rules.Rule | rules.RowRule:
    """Return a fresh rule."""
    required: dict[str, dict[str, object]] = {
        "constant": {"weights": [0.6, 0.4, 0.2][:count]},
        "momentum-weights": {"rule": "mgda"},
    }
    return rules.get(name, **required.get(name, {}))


def aligned(rule: rules.Rule | rules.RowRule, J: Tensor) -> Tensor:
    """Return the aligned gradients (calls, 2) of a rule that is called again and again on the same gradients."""
    calls = range(_CALLS)
    if isinstance(rule, rules.RowRule):
        return torch.stack([rule(J) for _ in calls])
    return torch.stack([J.T @ rule(J @ J.T) for _ in calls])


def arrow(axis: Axes, end: Tensor, color: str, width: float = 2.2) -> None:
    """Draw an arrow from the origin."""
    style = {"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 16}
    axis.annotate("", xy=tuple(end.tolist()), xytext=(0.0, 0.0), arrowprops=style)


def label(axis: Axes, end: Tensor, text: str, color: str, beside: bool = False) -> None:
    """Write beyond an arrow's tip, or to the right of it where another arrow lies beyond."""
    along = end / end.norm()
    place = end + 0.3 * (torch.stack([along[1], -along[0]]) if beside else along)
    axis.text(*place.tolist(), text, color=color, fontsize=15, ha="center", va="center")


def panel(axis: Axes, rule: rules.Rule | rules.RowRule, J: Tensor) -> None:
    """Draw the gradients, the cone without conflict, the plain weighted sum and the results."""
    axis.set(xlim=(-2.2, 2.6), ylim=(-0.85, 2.95), aspect="equal")
    axis.axis("off")
    degrees = torch.atan2(J[:, 1], J[:, 0]).rad2deg()
    axis.add_patch(Wedge((0, 0), 2.75, float(degrees.max()) - 90, float(degrees.min()) + 90, color="0.92", zorder=0))
    for k, (gradient, color) in enumerate(zip(J, _COLORS, strict=False), 1):
        arrow(axis, gradient, color)
        label(axis, gradient, f"$g_{k}$", color)
    names = [f"g{k}" for k in range(1, len(J) + 1)]
    try:
        rule.check_groups(len(J), names)
    except ValueError:
        axis.text(0.2, -0.5, f"not for {len(J)} groups", fontsize=14, ha="center", color="tab:green")
        return
    plain = torch.tensor(rule.plain_weights(names), dtype=torch.float64) @ J
    axis.plot(*torch.stack([torch.zeros(2), plain]).T, color="grey", linestyle=":", linewidth=2.0)
    results = aligned(rule, J)
    last = results[-1]
    shrink = min(1.0, 1 / float((results[:, None] / _ROOM).max()))  # so that all lie within the room
    axis.plot(*(results * shrink).T, "o", color="tab:green", markersize=4, alpha=0.45, markeredgewidth=0)
    name = "$d$" if shrink == 1 else rf"${shrink:.2g}\,d$"
    if float(last.norm()) < _SHORTEST:
        axis.plot(0, 0, "o", color="tab:green", markersize=9)
        axis.text(0, -0.35, "$d = 0$", color="tab:green", fontsize=15, ha="center", va="center")
    else:
        arrow(axis, last * shrink, "tab:green", 3.0)
        cosines = J @ last / J.norm(dim=1) / last.norm()
        label(axis, last * shrink, name, "tab:green", beside=bool(cosines.max() > _PARALLEL))


def draw(name: str) -> None:
    """Write the figure of one rule."""
    figure = Figure(figsize=(7.2, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, count in zip(figure.subplots(1, 2), _POLAR, strict=True):
        panel(axis, make(name, count), gradients(count))
    figure.savefig(_FOLDER / f"{name}-gradients.png", dpi=100, pil_kwargs={"optimize": True})


def main() -> None:
    """Write the figures."""
    _FOLDER.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or rules.names():
        draw(name)


if __name__ == "__main__":
    main()
