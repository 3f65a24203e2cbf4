"""The benchmarks' plots: bars of several ways, and curves of them against a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullLocator, StrMethodFormatter

Bars = Mapping[str, float]
"""A way's name to its value."""
Curves = Mapping[str, Sequence[tuple[float, float]]]
"""A way's name to its points (size, value)."""

_OURS, _PEERS, _REFERENCE = "tab:blue", "tab:gray", "tab:green"


def bars(path: Path, panels: Mapping[str, Bars], xlabel: str, line: float | None = None, most: float = 1e9) -> None:
    """Draw a panel of horizontal bars for each title, two in a row.

    Args:
        path: The file.
        panels: A title to its bars.
        xlabel: What the values are.
        line: A value to mark.
        most: Where longer bars are cut off, lest one way hide the differences among the others; the figure at the end
            of a bar is always the value.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    tallest = max(len(values) for values in panels.values())
    figure = Figure(figsize=(7.2 * columns, rows * (1.2 + 0.27 * tallest)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, values) in zip(axes, panels.items(), strict=False):
        lengths = [min(value, most) for value in values.values()]
        drawn = axis.barh(list(values), lengths, color=[_color(name) for name in values])
        axis.bar_label(drawn, [f"{value:.2f}" for value in values.values()], padding=3, fontsize=8)
        axis.invert_yaxis()  # the first on top
        axis.margins(x=0.12)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(xlabel)
        if line is not None:
            axis.axvline(line, color="black", linewidth=0.8)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.savefig(path, dpi=110)


def curves(path: Path, panels: Mapping[str, Curves], xlabels: Sequence[str], ylabel: str, *, log: bool = False) -> None:
    """Draw a panel of curves for each title, side by side, sizes on a logarithmic axis.

    Args:
        path: The file.
        panels: A title to its curves.
        xlabels: What the sizes are, for each panel.
        ylabel: What the values are.
        log: Values on a logarithmic axis too.
    """
    figure = Figure(figsize=(5.2 * len(panels) + 2.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colors = {name: colormaps["tab20"](number % 20) for number, name in enumerate(names)}
    handles = {}
    for axis, xlabel, (title, lines) in zip(axes, xlabels, panels.items(), strict=True):
        for name, points in lines.items():
            style = "--" if _color(name) == _PEERS else "-"
            sizes, values = zip(*points, strict=True)
            (handles[name],) = axis.plot(sizes, values, style, color=colors[name], marker="o", markersize=3)
        axis.set_xscale("log")
        axis.set_yscale("log" if log else "linear")
        _plain_ticks(axis, sorted({size for points in lines.values() for size, _ in points}))
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(xlabel)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(ylabel)
    figure.legend([handles[name] for name in names], names, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def _plain_ticks(axis: Axes, sizes: Sequence[float]) -> None:
    """Mark the measured sizes, and write values as plain numbers where their axis is logarithmic."""
    axis.xaxis.set_major_locator(FixedLocator(sizes))
    axis.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
    axis.xaxis.set_minor_locator(NullLocator())
    if axis.get_yscale() == "log":
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_locator(NullLocator())


def _color(name: str) -> str:
    if name in ("floor", "joint"):
        return _REFERENCE
    return _OURS if name.startswith(("stacked", "streamed", "probed", "gradalign")) else _PEERS
