"""The figures of a run and of a comparison, as PNG files."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradalign.errors import missing_extra
from gradalign.multiexit.runs import Run

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise missing_extra("matplotlib", "multiexit") from error

Runs = Mapping[str, Sequence[Run]]
"""A method's name to its finished runs, one a seed."""

_RIGHT_ANGLE = 90.0


def plot_run(run: Run) -> list[Path]:
    """Draw what a finished run did: depth against accuracy, and where it has two losses angles and weights.

    Returns:
        The files, in the run's folder.
    """
    return plot_runs({run.config.method: [run]}, run.folder)


def plot_runs(runs: Runs, folder: Path) -> list[Path]:
    """Draw several methods together.

    Args:
        runs: Maps a method to its finished runs, one a seed.
        folder: Where the files go.

    Returns:
        The files: depth against accuracy (GAML-BERT, Figure 4), the histogram of gradient angles (Figure 3) and the
        weights over time; the last two of the methods that have two losses, weights where the rule has any.
    """
    paired = {method: of_method for method, of_method in runs.items() if _has_pair(of_method[0])}
    drawn = [_draw(folder / "depth-accuracy.png", [runs], _depth_scores)]
    if paired:
        drawn.append(_draw(folder / "angles.png", _alone(paired), _angles))
    weighted = {method: of_method for method, of_method in paired.items() if _has_weights(of_method[0])}
    if weighted:
        drawn.append(_draw(folder / "weights.png", _alone(weighted), _weights))
    return drawn


def _alone(runs: Runs) -> list[Runs]:
    """Return each method's runs by themselves, for a panel each."""
    return [{method: of_method} for method, of_method in runs.items()]


def canvas(panels: int, height: float = 3.8) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure with so many panels side by side; height in inches."""
    figure = Figure(figsize=(1.2 + 4.2 * max(panels, 1.4), height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False, sharey=True)[0])


def _draw(path: Path, panels: Sequence[Runs], draw: Callable[[Axes, Runs], None]) -> Path:
    """Draw one panel beside the other and write the file."""
    figure, axes = canvas(len(panels))
    for axis, runs in zip(axes, panels, strict=True):
        draw(axis, runs)
        axis.label_outer()
    figure.savefig(path, dpi=120)
    return path


def _depth_scores(axis: Axes, runs: Runs) -> None:
    first = next(iter(runs.values()))[0]
    draw_depths(axis, {method: [run.scores for run in of_method] for method, of_method in runs.items()})
    axis.set_ylabel(f"{first.config.judged_on} {first.result['main']}")


def draw_depths(axis: Axes, curves: Mapping[str, Sequence[Sequence[float]]], title: str = "") -> None:
    """Draw each name's scores by exit, one sequence a seed: the mean, and the seeds' range as a band."""
    for name, of_name in curves.items():
        by_exit = list(zip(*of_name, strict=True))
        exits = range(1, len(by_exit) + 1)
        (line,) = axis.plot(
            exits, [statistics.fmean(values) for values in by_exit], marker="o", markersize=3, label=name
        )
        low, high = [min(values) for values in by_exit], [max(values) for values in by_exit]
        axis.fill_between(exits, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="exit", title=title)
    axis.grid(alpha=0.3)
    if curves:
        axis.legend()


def angles_of(run: Run) -> list[float]:
    """Return the angle between the first two loss groups at each step, degrees; a zero gradient has none."""
    return [angle for step in run.metrics("step") if (angle := step["angles"][0][1]) is not None]


def _angles(axis: Axes, runs: Runs) -> None:
    ((method, of_method),) = runs.items()
    draw_angles(axis, method, of_method)


def draw_angles(axis: Axes, name: str, runs: Sequence[Run]) -> None:
    """Draw the histogram of the angles between the first two loss groups; above 90 degrees they conflict."""
    angles = [angle for run in runs for angle in angles_of(run)]
    share = sum(angle > _RIGHT_ANGLE for angle in angles) / max(len(angles), 1)
    axis.hist(angles, bins=[5.0 * k for k in range(37)])
    axis.axvline(_RIGHT_ANGLE, color="black", linewidth=1)
    axis.set(xticks=range(0, 181, 45), xlabel="angle between gradients, degrees", ylabel="steps")
    axis.set_title(f"{name}: {share:.0%} above 90°")


def _weights(axis: Axes, runs: Runs) -> None:
    """The weights that the rule gave the loss groups in the first run; by blocks, their mean."""
    ((method, of_method),) = runs.items()
    steps = list(of_method[0].metrics("step"))
    for k, name in enumerate(steps[0]["groups"]):
        weights = [statistics.fmean(block[k] for block in _by_blocks(step["weights"])) for step in steps]
        axis.plot([step["step"] for step in steps], weights, label=name)
    axis.axhline(0, color="black", linewidth=0.8, zorder=0)
    axis.set(xlabel="step", ylabel="weight", title=f"{method}, seed {of_method[0].config.seed}")
    axis.legend()


def _by_blocks(weights: list[Any]) -> list[list[float]]:
    """Return weights (K,) or (blocks, K) as (blocks, K)."""
    return weights if isinstance(weights[0], list) else [weights]


def _has_pair(run: Run) -> bool:
    return len(next(run.metrics("step"))["groups"]) > 1


def _has_weights(run: Run) -> bool:
    """Rules that are no function of the Gramian have none."""
    return next(run.metrics("step"))["weights"] is not None
