"""train, compare, evaluate and plot."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from gradalign.cli import options as settings
from gradalign.cli.quiet import quiet
from gradalign.cli.watching import require_tensorboard, tensorboard

if TYPE_CHECKING:
    from gradalign.multiexit.inference import Policy
    from gradalign.multiexit.runs import Run

INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended
_SPEED_UPS = (1.5, 2.0)


def add_commands(commands: settings.Commands) -> None:
    """Add the commands."""
    one = commands.add_parser("train", help="train one network")
    one.add_argument(
        "--method", type=settings.method, metavar="METHOD", help=f"gaml-soft if left out; {settings.method_help()}"
    )
    one.add_argument(
        "--seed", type=int, default=None, help="of weights, order, augmentation and dropout; 0 if left out"
    )
    one.add_argument("--out", type=Path, help="folder of the run; runs/METHOD-seedN if left out")
    one.add_argument("--resume", type=Path, metavar="RUN", help="continue a run that was stopped, as it was configured")
    one.add_argument("--tensorboard", action="store_true", help="write curves into the run's folder tensorboard")
    settings.add_settings(one)
    one.set_defaults(command=_train)

    several = commands.add_parser("compare", help="train methods with the same seeds and print a table")
    several.add_argument(
        "--methods",
        nargs="+",
        type=settings.method,
        default=["joint", "ml", "gaml-hard", "gaml-soft"],
        metavar="METHOD",
        help=settings.method_help(),
    )
    several.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="one run a method and seed")
    several.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="folder of the runs; continued if it has some"
    )
    settings.add_settings(several)
    several.set_defaults(command=_compare)

    judged = commands.add_parser("evaluate", help="score of every exit, and of every policy at 1.5x and 2x")
    judged.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    judged.set_defaults(command=_evaluate)

    drawn = commands.add_parser("plot", help="draw the pictures of a run or a comparison again")
    drawn.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, or of a comparison")
    drawn.set_defaults(command=_plot)


def _train(options: argparse.Namespace) -> int:
    from gradalign.multiexit import processes
    from gradalign.multiexit.runs import Run
    from gradalign.multiexit.training import Interrupted, train
    from gradalign.multiexit.workloads import workload_of

    if options.tensorboard:
        require_tensorboard()
    method, seed = options.method or "gaml-soft", options.seed or 0
    if options.resume:
        _check_untouched(options)
        run = Run.open(options.resume)
        config = run.config
    else:
        config = settings.config_of(options, method, seed)
        run = Run(options.out or Path("runs") / f"{method.replace(':', '-')}-seed{seed}")
    with quiet(config.kind == "text"), processes.joined(settings.device_of(options)) as device:
        first = processes.rank() == 0
        if not options.resume:
            processes.on_first(run.check_new, device)  # before the data are read, which can take long
        workload = workload_of(config, device)
        if not options.resume:
            processes.on_first(lambda: Run.create(run.folder, config), device)
        watching = tensorboard(run.folder / "tensorboard") if options.tensorboard and first else nullcontext()
        try:
            with watching as watch:
                train(run, workload, watch)
        except Interrupted as stop:
            return say_interrupted(stop.step, f"gradalign train --resume {run.folder}") if first else INTERRUPTED
        if first:
            _say_trained(run)
    return 0


def _say_trained(run: Run) -> None:
    from gradalign.multiexit.figures import plot_run

    result = run.result
    print(f"{run.config.method}: {run.config.judged_on} {result['main']} of the exits, first to last")
    print("  " + " ".join(f"{score:.3f}" for score in run.scores))
    print(f"{result['steps']} steps in {result['seconds']:.0f} s; pictures:")
    for path in plot_run(run):
        print(f"  {path}")


def _compare(options: argparse.Namespace) -> int:
    from gradalign.multiexit.comparison import compare, runs_of, table
    from gradalign.multiexit.figures import plot_runs
    from gradalign.multiexit.training import Interrupted

    settings.check_alone("compare")
    config = settings.config_of(options, options.methods[0], options.seeds[0])
    try:
        with quiet(config.kind == "text"):
            rows = compare(config, options.methods, options.seeds, options.out, settings.device_of(options))
    except Interrupted as stop:
        return say_interrupted(stop.step, "the same command")
    text = table(rows)
    (options.out / "comparison.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{config.title}, {config.judged_on} rows:\n\n{text}\n")
    print(
        "speed-up: layers saved by an entropy policy that is as good on held-out rows as the last exit of"
        f" {options.methods[0]}; - where none is."
    )
    for row in rows:
        if row.equal is not None:
            print(
                f"  {row.method} seed {row.seed}: {row.equal.speed_up:.2f}x in layers, {row.equal.mac_speed_up:.2f}x in"
                f" multiply-accumulates, at test {row.main} {row.equal.score:.3f}"
            )
    print("pictures:")
    for path in plot_runs(runs_of(rows, options.out), options.out):
        print(f"  {path}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from gradalign.multiexit.evaluation import POLICIES, REGRESSION, at_speed_up, policy_of
    from gradalign.multiexit.files import write_json
    from gradalign.multiexit.policies import to_dict
    from gradalign.multiexit.runs import Run
    from gradalign.multiexit.workloads import judge_of

    run = Run.open(options.run)
    result, judge = run.result, judge_of(run.config)
    held_out, test = run.logits("held_out"), run.logits("test")
    costs, scores = run.costs, run.scores
    print(f"{run.config.method}: {run.config.judged_on} {result['main']} of each exit")
    for number, (score, cost) in enumerate(zip(scores, costs.exits, strict=True), 1):
        print(f"  exit {number:2}: {score:.3f}, {cost / 1e6:.2f} M MACs")
    outcomes = []
    exits, _, classes = held_out[0].shape
    if exits > 1:
        print(f"policies, calibrated on held-out rows, on {run.config.judged_on} rows")
    for name in POLICIES if classes > 1 else REGRESSION:
        policy = policy_of(name, held_out)
        for wanted in (speed_up for speed_up in _SPEED_UPS if speed_up <= exits):
            outcome = at_speed_up(policy, held_out[0], test, wanted, costs, judge)
            outcomes.append({"wanted": wanted, **asdict(outcome), "policy": to_dict(outcome.policy)})
            print(
                f"  {name:{max(map(len, POLICIES))}} {wanted}x: {result['main']} {outcome.score:.3f} at"
                f" {outcome.speed_up:.2f}x in layers, {outcome.mac_speed_up:.2f}x in MACs, {_setting(outcome.policy)}"
            )
    write_json(run.folder / "evaluation.json", {f"test_{result['main']}": scores, "policies": outcomes})
    return 0


def _setting(policy: Policy) -> str:
    """Return what calibration chose of a policy."""
    own = getattr(policy, "policy", policy)  # of a calibrated one, that inside
    name = next(name for name in ("threshold", "exit", "patience") if hasattr(own, name))
    return f"{name} {getattr(own, name):.3g}"


def _plot(options: argparse.Namespace) -> int:
    from gradalign.multiexit.comparison import runs_in
    from gradalign.multiexit.figures import plot_run, plot_runs
    from gradalign.multiexit.runs import Run

    several = runs_in(options.run)
    for path in plot_runs(several, options.run) if several else plot_run(Run.open(options.run)):
        print(path)
    return 0


def _check_untouched(options: argparse.Namespace) -> None:
    """Raise ValueError if a setting or a folder was given together with --resume, where it would do nothing."""
    names = list(settings.given(options))
    names += [name for name in ("method", "seed", "out") if getattr(options, name) is not None]
    if names:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ValueError(f"`--resume` must come without settings, for the run has its own, got {given}.")


def say_interrupted(step: int, how: str) -> int:
    """Say how a run goes on that Ctrl-C ended, and return the command's exit status."""
    print(f"\nstopped after step {step}; a checkpoint is written, {how} continues from it", file=sys.stderr)
    return INTERRUPTED
