"""A small network with three losses."""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 400  # a square matrix of it travels alone


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, 3)

    def losses(self, rank, names=("a", "b", "c")):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(rank))
        outputs = self.head(self.body(x))
        return {name: outputs[:, k].square().mean() for k, name in enumerate(names)}
