"""Small real models, each with two or three losses that share a part of it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class TwoHeads(nn.Module):
    """A trunk, a head for each of two losses, and a parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(5, 4)
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(4, 2)
        self.unused = nn.Parameter(torch.ones(2))

    def losses(self):
        hidden = torch.tanh(self.trunk(inputs(6, 5)))
        labels = torch.arange(6)
        return {
            "first": F.cross_entropy(self.first(hidden), labels % 3),
            "second": F.cross_entropy(self.second(hidden), labels % 2),
        }


class Convolutional(nn.Module):
    """Convolution, BatchNorm and channels_last memory."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(4, 3)
        self.to(memory_format=torch.channels_last)

    def losses(self):
        hidden = self.body(inputs(5, 3, 8, 8).to(memory_format=torch.channels_last)).mean((2, 3))
        logits = self.head(hidden)
        return {"ce": F.cross_entropy(logits, torch.arange(5) % 3), "size": hidden.square().mean(), "z": logits.mean()}


class Recurrent(nn.Module):
    """An embedding, a GRU, and weights tied between embedding and output."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.gru = nn.GRU(6, 6, batch_first=True)
        self.output = nn.Linear(6, 11)
        self.output.weight = self.embedding.weight

    def losses(self):
        tokens = torch.arange(12).reshape(3, 4) % 11
        states, _ = self.gru(self.embedding(tokens))
        return {
            "next": F.cross_entropy(self.output(states).flatten(0, 1), tokens.flatten()),
            "activity": states.square().mean(),
        }


class MixedPrecision(nn.Module):
    """Parameters in float64, float32 and bfloat16: one bucket each."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(4, 4).double()
        self.middle = nn.Linear(4, 4)
        self.narrow = nn.Linear(4, 2).bfloat16()

    def losses(self):
        hidden = self.middle(self.wide(inputs(6, 4).double()).float())
        return {"narrow": self.narrow(hidden.bfloat16()).float().square().mean(), "middle": hidden.square().mean()}


class Remembered(torch.autograd.Function):
    """The sum of a tensor; its backward returns the very tensor that it keeps, whatever flows in."""

    @staticmethod
    def forward(ctx, x, kept):
        ctx.kept = kept
        return x.sum()

    @staticmethod
    def backward(ctx, flowing):
        return ctx.kept, None


ALL = (TwoHeads, Convolutional, Recurrent, MixedPrecision)


def make(kind):
    torch.manual_seed(1)
    return kind()


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def raw_gradients(model, losses):
    """Each loss's gradients by plain autograd: {loss: {parameter: gradient or None}}."""
    named = dict(model.named_parameters())
    return {
        name: dict(
            zip(
                named,
                torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True),
                strict=True,
            )
        )
        for name, loss in losses.items()
    }
