"""Small networks, one for each thing that a model may be made of, with two losses that conflict."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CLASSES = 3


def two_losses(first, second):
    """A main loss, and one that pulls against it where both reach."""
    labels = torch.arange(len(first), device=first.device) % CLASSES
    main = F.cross_entropy(first.float(), labels)
    return {"main": main, "against": F.cross_entropy(second.float(), labels.flip(0)) - 0.9 * main}


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """A body and two heads; the second is reached by the second loss alone."""

    def __init__(self, body=None, shape=(6, 5), width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh()) if body is None else body
        self.heads = nn.ModuleList([nn.Linear(width, CLASSES), nn.Linear(width, CLASSES)])
        self.shape = shape

    def inputs(self):
        return inputs(*self.shape).to(self.heads[0].weight.device)

    def forward(self, x):
        hidden = self.body(x)
        return [head(hidden) for head in self.heads]

    def losses(self):
        return two_losses(*self(self.inputs()))


class Checkpointed(Net):
    """The last part of the body is computed again in backward; dropout in it with the same mask."""

    def __init__(self, *, reentrant=False, dropout=0.0):
        super().__init__()
        self.reentrant = reentrant
        middle = [nn.Dropout(dropout)] if dropout else []
        self.again = nn.Sequential(nn.Linear(4, 4), *middle, nn.Tanh())

    def forward(self, x):
        hidden = checkpoint(self.again, self.body(x), use_reentrant=self.reentrant)
        return [head(hidden) for head in self.heads]


class CheckpointedFromTheInputs(Net):
    """All that is before the checkpoint is an input, so that torch.autograd.grad would pass it by without a word."""

    def forward(self, x):
        hidden = checkpoint(self.body, x.requires_grad_(), use_reentrant=True)
        return [head(hidden) for head in self.heads]


class CheckpointedAndTied(Net):
    """The one weight before the heads is used in the checkpoint and beside it: half of its gradient would be lost."""

    def forward(self, x):
        x.requires_grad_()
        hidden = checkpoint(self.body, x, use_reentrant=True) + self.body(x.detach())
        return [head(hidden) for head in self.heads]


class Words(Net):
    """An embedding before the body; ``tied`` makes its weight the second head's too."""

    def __init__(self, *, tied=False, sparse=False):
        super().__init__(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        self.embedding = nn.Embedding(CLASSES, 4, sparse=sparse)
        if tied:
            self.heads[0].weight = self.embedding.weight

    def losses(self):
        tokens = torch.tensor([0, 1, 2, 2, 1, 0, 1])
        return two_losses(*self(self.embedding(tokens)))


class Reaching(Net):
    """Parameters that one loss reaches, that the other does, and that none does."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)

    def losses(self):
        first, second = self(self.inputs())
        labels = torch.arange(len(first), device=first.device) % CLASSES
        return {"main": F.cross_entropy(first, labels), "against": F.cross_entropy(second, labels.flip(0))}


class Sequence(Net):
    """A recurrent layer whose last state goes on, through dropout."""

    def __init__(self, kind, dropout=0.0):
        super().__init__(kind(5, 4, batch_first=True), (6, 3, 5))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        states, _ = self.body(x)
        return [head(self.dropout(states[:, -1])) for head in self.heads]


class Pictures(Net):
    """Convolution and BatchNorm, parameters and pictures in channels_last."""

    def __init__(self):
        body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        super().__init__(body, (6, 3, 8, 8))
        self.to(memory_format=torch.channels_last)

    def inputs(self):
        return super().inputs().to(memory_format=torch.channels_last)


class Siamese(Net):
    """One module, called by each loss on its own inputs."""

    def losses(self):
        x = self.inputs()
        return two_losses(self.heads[0](self.body(x)), self.heads[0](self.body(x.flip(1))))


class Autocast(Net):
    """The forward under autocast."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        with torch.autocast("cpu", dtype=self.dtype):
            return super().forward(x)


class Narrow(Net):
    """Parameters in bfloat16."""

    def __init__(self):
        super().__init__()
        self.bfloat16()

    def inputs(self):
        return super().inputs().bfloat16()


def frozen():
    net = Net()
    net.body[0].requires_grad_(False)
    net.heads[0].bias.requires_grad_(False)
    return net


def shallow():
    return Net(nn.Sequential(nn.Linear(5, 4), nn.Tanh()))


def normalised():
    return Net(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()))


def dropped():
    return Net(nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.4), nn.Tanh(), nn.Linear(16, 4)))


def seeded(make):
    """The same parameters at every call."""
    torch.manual_seed(1)
    return make()
