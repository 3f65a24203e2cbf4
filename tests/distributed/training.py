"""The same training on several ranks and in one process, with every option that has a say in what is exchanged."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gradalign import GradientAligner, rules

BATCH = 4  # rows on each rank
STEPS = 3

RULES = {
    "constant": lambda: rules.Constant([2.0, -0.5, 0.25]),
    "momentum-weights": lambda: rules.MomentumWeights("pcgrad"),
    "ga-soft": lambda: rules.GASoft(0.3),
    "ga-hard of the second": lambda: rules.GAHard(0.3, anchor="second"),
}


class Net(nn.Module):
    """Three losses. Some parameters are reached by all, one, the second and the third, one rank alone, or nothing."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(7)
        self.table = nn.Embedding(500, 256)
        self.trunk = nn.Linear(256, 300)  # large enough to travel alone
        self.body = nn.Linear(300, 7)
        self.first = nn.Linear(7, 3)
        self.others = nn.Linear(7, 2)
        self.extra = nn.Linear(7, 1)  # reached on the ranks but the first
        self.unused = nn.Parameter(torch.ones(3))
        self.to(dtype)

    def forward(self, tokens, rank):
        hidden = torch.tanh(self.body(torch.tanh(self.trunk(self.table(tokens)))))
        labels = tokens % 3
        second = self.others(hidden).square().mean()
        third = (self.others(hidden) - 1).abs().mean() - hidden[:, 0].mean()
        if rank > 0:
            second = second + self.extra(hidden).sigmoid().mean()
        return {"first": F.cross_entropy(self.first(hidden), labels), "second": second, "third": third}


def tokens_of(step, part, rank):
    generator = torch.Generator().manual_seed(1000 * step + 10 * part + rank)
    return torch.randint(0, 500, (BATCH,), generator=generator)


def losses_of(model, step, part, rank, ranks, names):
    """This rank's losses; without a rank the means over all ranks, which is what they stand for."""
    if rank is not None:
        losses = model(tokens_of(step, part, rank), rank)
    else:
        of_ranks = [model(tokens_of(step, part, one), one) for one in ranks]
        losses = {name: sum(losses[name] for losses in of_ranks) / len(of_ranks) for name in of_ranks[0]}
    return {name: losses[name] for name in names}


def train(case, rank, ranks):
    """Take some steps; return the gradients, Gramians and weights of each, and the parameters at the end.

    Args:
        case: "rule", the aligner's "options", and how the loop is: "wrap", "dtype", "parts", "probe", "scale".
        rank: This rank, or None for one process that has the data of all.
        ranks: All of them.
    """
    model = Net(case.get("dtype", torch.float64))
    wrap = case.get("wrap") if rank is not None else None
    forward = model if wrap is None else DistributedDataParallel(model, **wrap)
    rule, options = case["rule"], dict(case.get("options", {}))
    if options.get("scope") == "list":
        options["scope"] = [model.trunk.weight, model.body.weight, model.others.weight]
    # Adam divides by what may be nearly zero: in float32 that would show rounding alone.
    inner = torch.optim.AdamW if model.unused.dtype == torch.float64 else torch.optim.SGD
    optimizer = GradientAligner(
        inner(model.parameters(), lr=1e-2), RULES.get(rule, lambda: rules.get(rule))(), **options
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=case["scale"]) if "scale" in case else None
    probing, parts = case.get("probe", False), case.get("parts", 1)
    steps = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(parts):

            def losses(names, step=step, part=part):
                return losses_of(forward, step, part, rank, ranks, names)

            with optimizer.accumulate() if part + 1 < parts else nullcontext():
                if probing:
                    optimizer.backward(
                        losses(["first"]),
                        probe=lambda: losses(["second", "third"]),
                        scaler=scaler,
                    )
                else:
                    optimizer.backward(losses(["first", "second", "third"]), scaler=scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        report = optimizer.report
        steps.append(
            {
                "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
                "gramian": report.gramian,
                "weights": report.weights,
                "collector": report.collector,
            }
        )
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return {"steps": steps, "parameters": [p.detach().clone() for p in model.parameters()]}


def train_all(rank, size, cases):
    """What ``processes.run`` runs: every case in turn."""
    return {name: train(case, rank, range(size)) for name, case in cases.items()}
