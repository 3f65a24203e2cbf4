"""A run of all rules that saves after every step, to be killed: ``python -m tests.long_run FOLDER STEPS``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from gradalign import GradientAligner, rules
from tests.test_resume import fresh_rule

BATCH = 6
OVERFLOW = 2  # the step at which a loss is infinite: the scaler leaves it out

CASES = {
    **{name: (name, {}) for name in rules.names()},
    **{f"{name}, every third": (name, {"update_every": 3}) for name in ("pcgrad", "ga-soft", "gradvac")},
    **{f"{name}, shared": (name, {"scope": "shared"}) for name in ("pcgrad", "ga-soft", "moco")},
    **{f"{name}, by tensors": (name, {"granularity": "tensor"}) for name in ("gradvac", "momentum-weights", "moco")},
    "pcgrad, all three": ("pcgrad", {"update_every": 3, "scope": "shared", "granularity": "tensor"}),
}


class Net(nn.Module):
    """Dropout, a trunk, and a head that one loss alone reaches."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3))
        self.labels, self.size = nn.Linear(8, 3), nn.Linear(8, 1)

    def losses(self, x, labels):
        hidden = self.trunk(x)
        logits, size = self.labels(hidden), self.size(hidden)
        return {
            "first": F.cross_entropy(logits, labels),
            "second": (size.squeeze(-1) - x.sum(-1)).square().mean(),
            "third": -F.cross_entropy(logits, labels).square() + hidden.square().mean(),
        }


class Case:
    """A model and all that trains it."""

    def __init__(self, rule, options, steps):
        torch.manual_seed(1)
        self.model = Net()
        inner = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.optimizer = GradientAligner(inner, fresh_rule(rule), **options)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        self.parts = {name: getattr(self, name) for name in ("model", "optimizer", "scheduler", "scaler")}

    def step(self, x, labels, *, overflow):
        self.optimizer.zero_grad()
        losses = self.model.losses(x, labels)
        if overflow:
            losses["second"] = losses["second"] * torch.inf
        self.optimizer.backward(losses, scaler=self.scaler)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def run(folder, steps):
    """Go on from the checkpoint in the folder, or begin; print the number of steps done after each checkpoint."""
    cases = {name: Case(*case, steps) for name, case in CASES.items()}
    batches, done, path = torch.Generator().manual_seed(7), 0, folder / "run.pt"
    torch.manual_seed(3)
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for name, case in cases.items():
            case.load_state_dict(saved["cases"][name])
        batches.set_state(saved["batches"])
        torch.set_rng_state(saved["dropout"])
        done = saved["done"]
    print("begins with", done, flush=True)  # noqa: T201, for the parent
    while done < steps:
        x, labels = torch.randn(BATCH, 5, generator=batches), torch.randint(0, 3, (BATCH,), generator=batches)
        for case in cases.values():
            case.step(x, labels, overflow=done == OVERFLOW)
        done += 1
        state = {
            "cases": {name: case.state_dict() for name, case in cases.items()},
            "batches": batches.get_state(),
            "dropout": torch.get_rng_state(),
            "done": done,
        }
        torch.save(state, folder / "unfinished.pt")
        os.replace(folder / "unfinished.pt", path)  # all of it or nothing, whenever the process is killed
        print("saved", done, flush=True)  # noqa: T201, for the parent


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), int(sys.argv[2]))
