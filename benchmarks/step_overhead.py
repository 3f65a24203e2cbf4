"""What a step of gradient surgery costs, against the floor: one forward, K backwards, the inner step.

Times the floor, plain joint training and the stacked collector in turn, round after round, and prints each one's
median and the median of its ratios to the floor of the same round: the machine's speed may drift, the ratios hold.

    python benchmarks/step_overhead.py            ResNet-56 at batch 128, K = 2 and one group an exit
    python benchmarks/step_overhead.py --quick    the same at batch 32, few rounds
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from provenance import commit, machine, write
from torch import Tensor
from torch.nn import functional as F

from gradalign import GradientAligner
from gradalign.multiexit import MultiExitResNet, objectives
from gradalign.rules import GASoft, PCGrad

Losses = Callable[[Tensor, Tensor], dict[str, Tensor]]


def two_groups(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of all exits and mutual distillation: the groups of GAML-BERT."""
    return {
        "ce": objectives.weighted_cross_entropy(logits, labels),
        "kd": objectives.mutual_distillation(logits, reduction="mean"),
    }


def one_group_an_exit(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Each exit's cross-entropy alone."""
    return {f"exit{m}": F.cross_entropy(exit_logits, labels) for m, exit_logits in enumerate(logits, 1)}


class Steps:
    """One model and optimizer, and the ways to take a step with them."""

    def __init__(self, model: MultiExitResNet, inputs: Tensor, labels: Tensor, losses: Losses) -> None:
        self.model, self.inputs, self.labels, self.losses = model, inputs, labels, losses
        self.parameters = list(model.parameters())
        self.inner = torch.optim.SGD(self.parameters, lr=1e-6, momentum=0.9)

    def forward(self) -> dict[str, Tensor]:
        """Return the losses of a new step."""
        self.inner.zero_grad()
        return self.losses(self.model(self.inputs), self.labels)

    def floor(self) -> None:
        """Take K backwards and nothing else: the last one's gradients are stepped with."""
        losses = list(self.forward().values())
        for k, loss in enumerate(losses):
            gradients = torch.autograd.grad(loss, self.parameters, retain_graph=k + 1 < len(losses), allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.inner.step()

    def joint(self) -> None:
        """Take one backward on the sum."""
        sum(self.forward().values()).backward()
        self.inner.step()

    def aligned(self, optimizer: GradientAligner) -> None:
        """Take an aligned step."""
        optimizer.backward(self.forward())
        optimizer.step()


def measure(ways: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    """Return each way's median seconds and median ratio to the floor, timed in turn."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        # There and back: a speed that drifts within a round favours none.
        for name, way in list(ways.items())[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "seconds": statistics.median(times),
            "ratio": statistics.median(t / floor for t, floor in zip(times, seconds["floor"], strict=True)),
        }
        for name, times in seconds.items()
    }


def resnet(losses: Losses, exits: str, batch: int) -> Steps:
    """Return ResNet-56 with random images of 32 pixels; a step's cost does not depend on what they show."""
    torch.manual_seed(0)
    model = MultiExitResNet(depth=56, exits=exits)
    return Steps(model, torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,)), losses)


def main() -> None:
    """Measure, print the table, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="batch 32 and 3 rounds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the figures as JSON here")
    options = parser.parse_args()
    batch, rounds = (32, 3) if options.quick else (128, options.rounds)

    cases = {
        "ResNet-56, 27 exits, K = 2": (two_groups, "block"),
        "ResNet-56, 7 exits, one group an exit (K = 7)": (one_group_an_exit, "shallow-deep"),
    }
    results: dict[str, object] = {
        "machine": machine(),
        "torch": torch.__version__,
        "commit": commit(),
        "batch": batch,
        "rounds": rounds,
    }
    print(" ".join(f"{key} {value};" for key, value in results.items()))
    for title, (losses, exits) in cases.items():
        steps = resnet(losses, exits, batch)
        ways = {"floor": steps.floor, "joint": steps.joint}
        for rule in (GASoft(0.3), PCGrad()):
            optimizer = GradientAligner(steps.inner, rule, collector="stacked")
            ways[f"stacked, {rule.name}"] = lambda steps=steps, optimizer=optimizer: steps.aligned(optimizer)
        figures = measure(ways, rounds)
        results[title] = figures
        print(f"\n{title}, batch {batch}")
        for name, figure in figures.items():
            print(f"  {name:20} {figure['seconds'] * 1e3:9.1f} ms   {figure['ratio']:.3f} of the floor")
    if options.out:
        write(options.out, results)


if __name__ == "__main__":
    main()
