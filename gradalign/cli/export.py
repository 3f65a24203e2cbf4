"""export: a trained network on text with the policy that serves it."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradalign.cli import options as settings
from gradalign.cli.quiet import quiet
from gradalign.multiexit.evaluation import POLICIES


def add_commands(commands: settings.Commands) -> None:
    """Add the command."""
    out = commands.add_parser("export", help="write a network on text with its exit policy, as model.predict serves it")
    out.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run on text")
    out.add_argument("--out", type=Path, required=True, help="folder for the network; must not exist")
    out.add_argument(
        "--policy", choices=POLICIES, help="who leaves where (default: entropy, and patience in regression)"
    )
    out.add_argument(
        "--speed-up", type=float, default=2.0, metavar="X", help="in layers, on held-out rows (default: 2.0)"
    )
    out.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    from gradalign.multiexit import metrics, policies
    from gradalign.multiexit.configs import TextConfig
    from gradalign.multiexit.evaluation import outcome_of, policy_of
    from gradalign.multiexit.runs import Run
    from gradalign.multiexit.text.encoder import MultiExitEncoder
    from gradalign.multiexit.text.workload import MODEL
    from gradalign.multiexit.workloads import judge_of

    run = Run.open(options.run)
    if not isinstance(run.config, TextConfig):
        raise ValueError(f"`run` must be one on text, got {str(options.run)!r}, which is on {run.config.kind}.")
    run.check_finished()
    if not (run.folder / MODEL).is_dir():
        raise FileNotFoundError(
            f"`run` must hold its network, got {str(options.run)!r}, of a search, which keeps none; train the setting."
        )
    if options.out.exists():
        raise FileExistsError(f"`--out` must be a folder that is not there yet, got {str(options.out)!r}.")
    held_out = run.logits("held_out")
    exits, _, classes = held_out[0].shape
    policy: policies.Policy = policies.Budget(1)  # of a network with one exit
    if exits == 1 and options.policy:
        raise ValueError(f"`--policy` must be left out for a network with one exit, got {options.policy}.")
    if exits > 1:
        name = options.policy or ("entropy" if classes > 1 else "patience")
        policy = policies.calibrate(policy_of(name, held_out), held_out[0], options.speed_up)
    outcome = outcome_of(policy, run.logits("test"), run.costs, judge_of(run.config))
    with quiet(True):
        model = MultiExitEncoder.from_pretrained(run.folder / MODEL)
        model.config.policy = policies.to_dict(policy)
        model.save_pretrained(options.out)
    model.tokenizer.save_pretrained(options.out)
    print(f"{options.out}: {policy}")
    if exits > 1:
        nearest = metrics.speed_up(policy(held_out[0]), exits)
        print(f"on held-out rows: {nearest:.2f}x in layers, the nearest to {options.speed_up:g}x that there is")
    print(
        f"on development rows: {run.result['main']} {outcome.score:.3f} at {outcome.speed_up:.2f}x in layers,"
        f" {outcome.mac_speed_up:.2f}x in MACs"
    )
    return 0
