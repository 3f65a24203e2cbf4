"""Two losses with two valleys in the way: which rules reach the Pareto front of CAGrad's toy problem, from where.

Each rule runs through GradientAligner around Adam, from five starts at once: every start is a tensor, and so a block
with a Gramian of its own. Printed is how far each start ends from the Pareto front, in the plane of the losses.

    python benchmarks/toy_problem.py --out benchmarks/results/toy_problem.json --figures docs/_static/gallery
    python benchmarks/toy_problem.py --quick                      three rules, few steps, nothing written
    python benchmarks/toy_problem.py --rules cagrad mgda --learning-rate 1e-3 --steps 50000

The problem is that of Liu et al., 2021, arXiv:2110.14048, as its code has it, whose three starts are the first three
here; it takes 100,000 steps of Adam at 1e-3. The last two starts are from Navon et al., 2022, arXiv:2202.01017, who
take 35,000 steps at 1e-3 and multiply f1 by 0.1 (--scale 0.1). With Adam a coordinate goes about the learning rate in
a step: 20,000 steps at 2e-3, the default here, go as far as 40,000 at 1e-3. All rules take 20 to 25 minutes, one core.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from provenance import commit, machine, write
from torch import Tensor

from gradalign import GradientAligner, rules
from gradalign.errors import GradAlignError

STARTS = ((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
REQUIRED: dict[str, dict[str, object]] = {"constant": {"weights": [0.5, 0.5]}, "momentum-weights": {"rule": "mgda"}}
QUICK, QUICK_STEPS = ("sum", "ga-soft", "pcgrad"), 2_000
NAMES = ("f1", "f2")
STEPS, LEARNING_RATE = 20_000, 2e-3
REACHED = 0.1
"""A start has reached the front if it ends nearer than this; along the front each loss changes by 20."""

_SIDES = torch.tensor([-1.0, 1.0], dtype=torch.float64)
_FLOOR = 5e-6
_EVERY = 100
_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown")


def objectives(x: Tensor) -> Tensor:
    """Return both losses.

    Above x2 = 0 a loss is the logarithm of the distance to a bent valley, f1's on the left, f2's on the right; below it
    is a bowl, f1's on the right, f2's on the left. At x2 = 0 both vanish.

    Args:
        x: (..., 2).

    Returns:
        (..., 2), f1 and f2.
    """
    x1, x2 = x[..., :1], x[..., 1:]
    side = _SIDES.to(x.dtype)
    valley = ((x1 - side * (7 - 2 * x2.tanh())).abs() / 2).clamp(min=_FLOOR).log() + 6
    bowl = ((x1 + 7 * side) ** 2 + (x2 + 8) ** 2 / 10) / 10 - 20
    height = (x2 / 2).tanh()
    return height.clamp(min=0) * valley + (-height).clamp(min=0) * bowl


def pareto_set(points: int = 2001) -> Tensor:
    """Return the points that no other beats in both losses, from the minimum of f2 to that of f1.

    They lie in the bowls: in a valley of one loss, -6 at best, the other is above 7, and both are worse than on the
    front. There the slopes in x1 of v f1 + (1 - v) f2 cancel at v = (7 + x1)/14, whatever x2 is; x2 is then found by
    bisection, where the slope of that sum in x2 vanishes. tests/test_toy_problem.py looks for points that beat them.

    Args:
        points: How many.

    Returns:
        (points, 2).
    """
    x1 = torch.linspace(-7, 7, points, dtype=torch.float64)
    v = (7 + x1) / 14
    low, high = torch.full_like(x1, -12.0), torch.full_like(x1, -4.0)
    for _ in range(60):
        x2 = ((low + high) / 2).requires_grad_()
        f1, f2 = objectives(torch.stack([x1, x2], -1)).unbind(-1)
        (slope,) = torch.autograd.grad((v * f1 + (1 - v) * f2).sum(), x2)
        low, high = torch.where(slope < 0, x2, low).detach(), torch.where(slope < 0, high, x2).detach()
    return torch.stack([x1, (low + high) / 2], -1)


def distance(values: Tensor, front: Tensor) -> Tensor:
    """Return the distance of points to a polyline.

    Args:
        values: (..., 2).
        front: (n, 2), its corners in order.

    Returns:
        (...).
    """
    start, edge = front[:-1], front.diff(dim=0)
    offset = values[..., None, :] - start
    along = ((offset * edge).sum(-1) / (edge * edge).sum(-1)).clamp(0, 1)
    return (offset - along[..., None] * edge).norm(dim=-1).amin(-1)


def descend(
    rule: rules.Rule | rules.RowRule,
    starts: Sequence[Sequence[float]],
    steps: int,
    learning_rate: float = LEARNING_RATE,
    scale: float = 1.0,
) -> Tensor:
    """Take steps of Adam with the rule from all starts at once.

    The losses are sums over the starts. A start's gradients are those of its own terms, and a block of its own has them
    alone in its Gramian, so that a rule without random numbers does what it does from that start alone. One with random
    numbers draws for each block.

    Args:
        rule: A fresh rule for two groups.
        starts: Pairs of coordinates.
        steps: How many.
        learning_rate: Adam's, about how far a coordinate goes in a step.
        scale: Factor of f1.

    Returns:
        (records, starts, 2): where the starts are at first, after every 100th step and after the last.
    """
    points = [torch.nn.Parameter(torch.tensor(start, dtype=torch.float64)) for start in starts]
    optimizer = GradientAligner(torch.optim.Adam(points, lr=learning_rate), rule, granularity="tensor")
    path = [torch.stack(points).detach()]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        f1, f2 = objectives(torch.stack(points)).sum(0)
        optimizer.backward({"f1": scale * f1, "f2": f2})
        optimizer.step()
        if step % _EVERY == 0 or step == steps:
            path.append(torch.stack(points).detach())
    return torch.stack(path)


def draw(title: str, path: Tensor, target: Path) -> None:
    """Draw a rule's paths, in the plane and in the losses.

    Args:
        title: What to write above.
        path: (records, starts, 2), as ``descend`` returns it.
        target: The file.
    """
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=15)
    plane, losses = figure.subplots(1, 2)
    best = pareto_set(201)
    grid = torch.linspace(-11, 11, 221, dtype=torch.float64)
    mean = objectives(torch.cartesian_prod(grid, grid)).mean(-1).reshape(221, 221).T
    plane.contour(grid, grid, mean, levels=14, cmap="Greys_r", linewidths=0.6, alpha=0.6)
    _paths(plane, path, best)
    _paths(losses, objectives(path), objectives(best))
    plane.set(xlim=(-11, 11), ylim=(-11, 11), xticks=(-10, 0, 10), yticks=(-10, 0, 10))
    losses.set(xlim=(-22, 12), ylim=(-22, 12), xticks=(-20, -10, 0, 10), yticks=(-20, -10, 0, 10))
    for axis, letter in ((plane, "x"), (losses, "f")):
        axis.set_aspect("equal")
        axis.tick_params(labelsize=12)
        axis.set_xlabel(f"${letter}_1$", fontsize=14, labelpad=-4)
        axis.set_ylabel(f"${letter}_2$", fontsize=14, labelpad=-10)
    figure.savefig(target, dpi=80, pil_kwargs={"optimize": True})


def _paths(axis: Axes, path: Tensor, front: Tensor) -> None:
    axis.plot(*front.T, color="tab:red", linewidth=6, alpha=0.45, solid_capstyle="round")
    for points, color in zip(path.unbind(1), _COLORS, strict=False):
        axis.plot(*points.T, color=color, linewidth=1.5)
        axis.plot(*points[0], "o", color=color, markersize=6)
        axis.plot(*points[-1], "*", color=color, markersize=12, markeredgecolor="black", markeredgewidth=0.7)


def outcome(name: str, front: Tensor, options: argparse.Namespace) -> dict[str, object]:
    """Run one rule and return what came of it: an entry of the JSON."""
    rule = rules.get(name, **REQUIRED.get(name, {}))
    try:
        rule.check_groups(len(NAMES), NAMES)
    except ValueError as error:
        return {"rule": repr(rule), "not run": str(error)}
    began = time.perf_counter()
    try:
        path = descend(rule, STARTS, options.steps, options.learning_rate, options.scale)
    except GradAlignError as error:
        return {"rule": repr(rule), "failed": str(error)}
    seconds = time.perf_counter() - began
    if options.figures:
        draw(name, path, options.figures / f"{name}-toy.png")
    values = objectives(path[-1])
    far = distance(values, front)
    return {
        "rule": repr(rule),
        "ends": path[-1].tolist(),
        "losses": values.tolist(),
        "distances": far.tolist(),
        "reached": (far < REACHED).tolist(),
        "seconds": seconds,
    }


def line(name: str, result: dict[str, object]) -> str:
    """Return a rule's line of the table: a distance for each start, with a star where the front is reached."""
    if "distances" not in result:
        return f"{name:18} {result.get('not run') or result.get('failed')}"
    cells = zip(result["distances"], result["reached"], strict=True)
    return f"{name:18}" + "".join(f"{far:13.4f}{'*' if near else ' '}" for far, near in cells)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} for {QUICK_STEPS} steps")
    made.add_argument("--steps", type=int, default=STEPS)
    made.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    made.add_argument("--rules", nargs="+", choices=rules.names(), default=rules.names(), metavar="RULE")
    made.add_argument("--scale", type=float, default=1.0, help="factor of f1")
    made.add_argument("--out", type=Path, help="write the results as JSON here")
    made.add_argument("--figures", type=Path, help="write a figure for each rule into this folder")
    return made


def main() -> None:
    """Run the rules, print a line for each, write JSON and figures where asked."""
    options = parser().parse_args()
    if options.quick:
        options.rules, options.steps = QUICK, QUICK_STEPS
    if options.figures:
        options.figures.mkdir(parents=True, exist_ok=True)

    front = objectives(pareto_set())
    results: dict[str, object] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "device": "cpu",
        "torch": torch.__version__,
        "commit": commit(),
        "steps": options.steps,
        "learning rate": options.learning_rate,
        "scale of f1": options.scale,
        "reached below": REACHED,
        "starts": STARTS,
    }
    print(" ".join(f"{key} {value};" for key, value in results.items()))
    print(f"Distance to the Pareto front, in the losses; * below {REACHED}")
    print(f"{'':18}" + "".join(f"{f'({a:g}, {b:g})':>13} " for a, b in STARTS))
    results["rules"] = entries = {}
    for name in options.rules:
        entries[name] = outcome(name, front, options)
        print(line(name, entries[name]), flush=True)
    if options.out:
        write(options.out, results)


if __name__ == "__main__":
    main()
