"""The figures of a run and of a comparison, as PNG files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gradalign.errors import missing_extra
from gradalign.multiexit.runs import Run

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise missing_extra("matplotlib", "multiexit") from error

_RIGHT_ANGLE = 90.0
_BINS = [5.0 * k for k in range(37)]  # 0 to 180 degrees


def plot_run(run: Run) -> list[Path]:
    """Draw what a finished run did: depth against accuracy, and where it has two losses angles and weights.

    Returns:
        The files, in the run's folder.
    """
    return plot_runs({run.config.method: [run]}, run.folder)


def plot_runs(runs: Mapping[str, Sequence[Run]], folder: Path) -> list[Path]:
    """Draw several methods together.

    Args:
        runs: Maps a method to its finished runs, one a seed.
        folder: Where the files go.

    Returns:
        The files: depth against accuracy (GAML-BERT, Figure 4), the histogram of gradient angles (Figure 3) and the
        weights over time; the last two of the methods that have two losses.
    """
    files = [folder / "depth-accuracy.png"]
    _draw(files[0], {"test": runs}, _depth_accuracy)
    paired = {method: of_method for method, of_method in runs.items() if _has_pair(of_method[0])}
    if paired:
        files += [folder / "angles.png", folder / "weights.png"]
        _draw(files[1], {method: {method: of_method} for method, of_method in paired.items()}, _angles)
        _draw(files[2], {method: {method: of_method} for method, of_method in paired.items()}, _weights)
    return files


def _draw(path: Path, panels: Mapping[str, Mapping[str, Sequence[Run]]], draw: object) -> None:
    figure = Figure(figsize=(1.2 + 4.2 * max(len(panels), 1.4), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, runs) in zip(axes, panels.items(), strict=True):
        draw(axis, title, runs)  # type: ignore[operator]
    axes[0].set_ylabel(axes[0].get_ylabel())
    figure.savefig(path, dpi=120)


def _depth_accuracy(axis: Axes, title: str, runs: Mapping[str, Sequence[Run]]) -> None:
    """One curve a method: the mean over seeds, and the range of them as a band."""
    for method, of_method in runs.items():
        curves = [run.result["test_accuracy"] for run in of_method]
        exits = range(1, len(curves[0]) + 1)
        (line,) = axis.plot(exits, _over_runs(curves, _mean), marker="o", markersize=3, label=method)
        if len(curves) > 1:
            low, high = _over_runs(curves, min), _over_runs(curves, max)
            axis.fill_between(exits, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(xlabel="exit", ylabel="accuracy (test)", title="depth against accuracy")
    axis.grid(alpha=0.3)
    axis.legend()


def _angles(axis: Axes, title: str, runs: Mapping[str, Sequence[Run]]) -> None:
    """The angle between the first two loss groups at every step; above 90 degrees they conflict."""
    angles = [
        step["angles"][0][1]
        for of_method in runs.values()
        for run in of_method
        for step in run.metrics("step")
        if step["angles"][0][1] is not None
    ]
    share = sum(angle > _RIGHT_ANGLE for angle in angles) / max(len(angles), 1)
    axis.hist(angles, bins=_BINS)
    axis.axvline(_RIGHT_ANGLE, color="black", linewidth=1)
    axis.set(xlabel="angle between gradients, degrees", ylabel="steps", title=f"{title}: {share:.0%} above 90°")


def _weights(axis: Axes, title: str, runs: Mapping[str, Sequence[Run]]) -> None:
    """The weights that the rule gave the loss groups; by blocks, their mean."""
    run = next(iter(runs.values()))[0]
    steps = list(run.metrics("step"))
    for k, name in enumerate(steps[0]["groups"]):
        axis.plot([step["step"] for step in steps], [_weight(step["weights"], k) for step in steps], label=name)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="step", ylabel="weight", title=f"{title}, seed {run.config.seed}")
    axis.legend()


def _weight(weights: Sequence[float] | Sequence[Sequence[float]], group: int) -> float:
    first = weights[0]
    if isinstance(first, Sequence):
        return _mean(block[group] for block in weights)  # type: ignore[index]
    return weights[group]  # type: ignore[return-value]


def _has_pair(run: Run) -> bool:
    return len(next(run.metrics("step"))["groups"]) > 1


def _over_runs(curves: Sequence[Sequence[float]], reduce: object) -> list[float]:
    return [reduce(values) for values in zip(*curves, strict=True)]  # type: ignore[operator]


def _mean(values: Iterable[float]) -> float:
    every = list(values)
    return sum(every) / len(every)
