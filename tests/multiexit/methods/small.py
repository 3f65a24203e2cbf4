"""A small network with exits whose hidden state is several tensors, as a text encoder's: shared pooler, dropout."""

from __future__ import annotations

import torch
from torch import nn

from gradalign.multiexit.inference import every_exit


class Small(nn.Module):
    """Linear layers, an exit after each: shared pooler, dropout, own linear head."""

    def __init__(self, num_exits=3, width=6, classes=4, dropout=0.0):
        super().__init__()
        self.num_exits = num_exits
        self.backbone = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)) for _ in range(num_exits)
        )
        self.pooler = nn.Linear(width, width)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Dropout(dropout), nn.Linear(width, classes)) for _ in range(num_exits)
        )

    def start(self, inputs):
        return dict(inputs)

    def layers(self, hidden, exit):
        return hidden | {"x": self.backbone[exit - 1](hidden["x"])}

    def classify(self, hidden, exit):
        return self.heads[exit - 1](self.pooler(hidden["x"] * hidden["mask"]))

    def advance(self, hidden, exit):
        hidden = self.layers(hidden, exit)
        return hidden, self.classify(hidden, exit)

    def forward(self, **inputs):
        return every_exit(self, inputs)


def small(num_exits=3, **sizes):
    torch.manual_seed(0)
    return Small(num_exits, **sizes)


def batch(rows=5, width=6, classes=4):
    generator = torch.Generator().manual_seed(1)
    inputs = {"x": torch.randn(rows, width, generator=generator), "mask": torch.ones(rows, 1)}
    return inputs, torch.arange(rows) % classes


def random_logits(num_exits=3, rows=5, classes=4, seed=0):
    return torch.randn(num_exits, rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
