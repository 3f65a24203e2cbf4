"""The command line: train, compare, evaluate and plot multi-exit networks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from gradalign import __version__
from gradalign.errors import GradAlignError, MissingExtraError
from gradalign.multiexit import methods

if TYPE_CHECKING:
    from gradalign.multiexit.configs import ImageConfig

_SPEED_UPS = (1.5, 2.0)
_INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 after an error, 2 for wrong usage, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except KeyboardInterrupt:
        print("gradalign: stopped", file=sys.stderr)
        return _INTERRUPTED
    except (GradAlignError, MissingExtraError, ValueError, OSError) as error:
        print(f"gradalign: {error}", file=sys.stderr)
        return 1


def _train(options: argparse.Namespace) -> int:
    from gradalign.multiexit.figures import plot_run
    from gradalign.multiexit.runs import Run
    from gradalign.multiexit.training import Interrupted, train
    from gradalign.multiexit.workloads import workload_of

    device = _device(options)
    config = _config(options, options.method, options.seed)
    if options.resume:
        _check_untouched(config, options.out)
        run = Run.open(options.resume)
        workload = workload_of(run.config, device)
    else:
        workload = workload_of(config, device)
        run = Run.create(options.out or Path("runs") / f"{options.method}-seed{options.seed}", config)
    try:
        train(run, workload)
    except Interrupted as stop:
        return _say_interrupted(stop.step, f"gradalign train --resume {run.folder}")
    result = run.result
    print(f"{run.config.method}: test accuracy of the exits, first to last")
    print("  " + " ".join(f"{accuracy:.3f}" for accuracy in result["test_accuracy"]))
    print(f"{result['steps']} steps in {result['seconds']:.0f} s; pictures:")
    for path in plot_run(run):
        print(f"  {path}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from gradalign.multiexit.comparison import compare, runs_of, table
    from gradalign.multiexit.figures import plot_runs
    from gradalign.multiexit.training import Interrupted

    config = _config(options, options.methods[0], options.seeds[0])
    try:
        rows = compare(config, options.methods, options.seeds, options.out, _device(options))
    except Interrupted as stop:
        return _say_interrupted(stop.step, "the same command")
    text = table(rows)
    (options.out / "comparison.md").write_text(text + "\n", encoding="utf-8")
    print(f"\nMultiExitResNet-{config.depth} on {config.data}, {config.epochs} epochs, test images:\n\n{text}\n")
    print(
        "speed-up: layers saved by an entropy policy that is as accurate on held-out images as the last exit of"
        f" {options.methods[0]}; - where none is."
    )
    for row in rows:
        if row.equal is not None:
            print(
                f"  {row.method} seed {row.seed}: {row.equal.speed_up:.2f}x in layers, {row.equal.mac_speed_up:.2f}x in"
                f" multiply-accumulates, at test accuracy {row.equal.accuracy:.3f}"
            )
    print("pictures:")
    for path in plot_runs(runs_of(rows, options.out), options.out):
        print(f"  {path}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from gradalign.multiexit import policies
    from gradalign.multiexit.evaluation import at_speed_up
    from gradalign.multiexit.files import write_json
    from gradalign.multiexit.runs import Run

    run = Run.open(options.run)
    held_out, _ = run.logits("held_out")
    test, labels = run.logits("test")
    macs, accuracies = run.result["costs"], run.result["test_accuracy"]
    print(f"{run.config.method}: test accuracy of each exit")
    for number, (accuracy, cost) in enumerate(zip(accuracies, macs, strict=False), 1):
        print(f"  exit {number:2}: {accuracy:.3f}, {cost / 1e6:.2f} M MACs")
    print("policies, calibrated on held-out images, on test images")
    outcomes = []
    kinds = (policies.Budget(1), policies.Entropy(0.0), policies.MaxProbability(1.0), policies.Patience(1))
    for policy in kinds:
        for wanted in _SPEED_UPS:
            outcome = at_speed_up(policy, held_out, test, labels, wanted, macs)
            outcomes.append({"wanted": wanted, **asdict(outcome), "policy": repr(outcome.policy)})
            print(
                f"  {wanted}x: accuracy {outcome.accuracy:.3f} at {outcome.speed_up:.2f}x in layers,"
                f" {outcome.mac_speed_up:.2f}x in MACs, {outcome.policy}"
            )
    write_json(run.folder / "evaluation.json", {"test_accuracy": accuracies, "policies": outcomes})
    return 0


def _plot(options: argparse.Namespace) -> int:
    from gradalign.multiexit.comparison import runs_in
    from gradalign.multiexit.figures import plot_run, plot_runs
    from gradalign.multiexit.runs import Run

    several = runs_in(options.run)
    for path in plot_runs(several, options.run) if several else plot_run(Run.open(options.run)):
        print(path)
    return 0


def _config(options: argparse.Namespace, method: str, seed: int) -> ImageConfig:
    from gradalign.multiexit.configs import ImageConfig

    return ImageConfig(
        method=method,
        seed=seed,
        data=options.data if options.data == "digits" else str(Path(options.data).resolve()),
        depth=options.depth,
        exits=options.exits,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warm_up=options.warm_up,
        weight_decay=options.weight_decay,
        alpha=options.alpha,
        temperature=options.temperature,
        reduction=options.reduction,
        full_step=options.full_step,
        pair_exit=options.pair_exit,
        granularity=options.granularity,
    )


def _check_untouched(config: ImageConfig, out: Path | None) -> None:
    """Raise ValueError if a setting or a folder was given together with --resume, where it would do nothing."""
    from dataclasses import fields

    untouched = type(config)()
    names = [f.name for f in fields(config) if getattr(config, f.name) != getattr(untouched, f.name)]
    given = [f"--{name.replace('_', '-')}" for name in names]
    given += ["--out"] if out else []
    if given:
        raise ValueError(f"`--resume` must come without settings, for the run has its own, got {', '.join(given)}.")


def _device(options: argparse.Namespace) -> torch.device:
    """Return the device, or raise ValueError where this machine or this torch has none such."""
    name = options.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`device` must be auto, cpu or one that torch has, got {name!r}: {reason}") from error


def _say_interrupted(step: int, how: str) -> int:
    print(f"\nstopped after step {step}; a checkpoint is written, {how} continues from it", file=sys.stderr)
    return _INTERRUPTED


def _exits(text: str) -> str | tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",")) if text[:1].isdigit() else text
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a name or block numbers as 4,8,12, got {text!r}") from error


def _method(text: str) -> str:
    try:
        return methods.get(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gradalign: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gradalign", description=__doc__)
    parser.add_argument("--version", action="version", version=f"gradalign {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("train", help="train one network", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    one.add_argument("--method", type=_method, default="gaml-soft", metavar="METHOD", help="; ".join(_method_help()))
    one.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    one.add_argument("--out", type=Path, help="folder of the run; runs/METHOD-seedN if left out")
    one.add_argument("--resume", type=Path, metavar="RUN", help="continue a run that was stopped, as it was configured")
    _add_settings(one)
    one.set_defaults(command=_train)

    several = commands.add_parser(
        "compare",
        help="train methods with the same seeds and print a table",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    several.add_argument(
        "--methods",
        nargs="+",
        default=["joint", "ml", "gaml-hard", "gaml-soft"],
        type=_method,
        metavar="METHOD",
        help="; ".join(_method_help()),
    )
    several.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="one run a method and seed")
    several.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="folder of the runs; continued if it has some"
    )
    _add_settings(several)
    several.set_defaults(command=_compare)

    judged = commands.add_parser("evaluate", help="accuracy of every exit, and of every policy at 1.5x and 2x")
    judged.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    _add_device(judged)
    judged.set_defaults(command=_evaluate)

    drawn = commands.add_parser("plot", help="draw the pictures of a run or a comparison again")
    drawn.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, or of a comparison")
    drawn.set_defaults(command=_plot)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default="digits",
        metavar="digits|PATH.npz",
        help="images; a file holds x_train, x_test, uint8 (N, H, W, C), and y_train, y_test, integers from 0",
    )
    parser.add_argument("--depth", type=int, default=56, help="layers of the ResNet, 6n + 2")
    parser.add_argument("--exits", type=_exits, default="block", help="block, shallow-deep, or block numbers as 4,8,12")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of SGD with momentum 0.9, its largest")
    parser.add_argument(
        "--warm-up", type=float, default=0.1, help="share of the steps in which the learning rate grows"
    )
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="of SGD")
    parser.add_argument("--alpha", type=float, help="weight of the distillation loss; the method's own if left out")
    parser.add_argument("--temperature", type=float, help="of the distillation; the method's own if left out")
    parser.add_argument(
        "--reduction",
        choices=("sum", "mean"),
        help="of the distillation over pairs of exits, the method's own if left out; sum is the paper's Eq. 3",
    )
    parser.add_argument(
        "--full-step",
        action=argparse.BooleanOptionalAction,
        help="whether GA-hard takes the whole gradient of the cross-entropy where it drops the distillation",
    )
    parser.add_argument(
        "--pair-exit", type=int, help="the early exit of pml-..., which train it and the last; 1 if left out"
    )
    parser.add_argument(
        "--granularity", default="global", choices=("global", "layer", "tensor"), help="what shares one Gramian"
    )
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")


def _method_help() -> list[str]:
    named = [f"{name}: {methods.get(name).summary}" for name in methods.names()]
    return [
        *named,
        "kd:RULE: cross-entropy and distillation joined by a rule; exits:RULE: one loss an exit joined by it",
    ]


if __name__ == "__main__":
    sys.exit(main())
