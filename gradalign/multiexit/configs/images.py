"""What decides how a run on images comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradalign.errors import finite_number
from gradalign.multiexit.configs.base import Config
from gradalign.multiexit.objectives import check_count
from gradalign.multiexit.resnet import MultiExitResNet


@dataclass(frozen=True, kw_only=True)
class ImageConfig(Config):
    """A run of ``MultiExitResNet`` on images, by SGD.

    Attributes:
        data: "digits" or the path of an .npz file.
        depth: Of the ResNet, 6n + 2.
        exits: "block", "shallow-deep" or block numbers.
        learning_rate: After the warm-up and until 35 % of the steps; a tenth until 60 %, a hundredth until 85 %, a
            thousandth then.
        warm_up: Share of the steps in which the learning rate grows.
        momentum: Of SGD.
    """

    kind: ClassVar[str] = "images"

    data: str = "digits"
    depth: int = 56
    exits: str | tuple[int, ...] = "block"
    momentum: float = 0.9

    def check(self) -> None:
        """Raise TypeError or ValueError at the first setting that makes no sense."""
        super().check()
        check_count("depth", self.depth)
        for name in ("warm_up", "momentum"):
            finite_number(name, getattr(self, name), 0.0, 1.0)
        if isinstance(self.exits, list):
            object.__setattr__(self, "exits", tuple(self.exits))
        with torch.device("meta"):  # says what is wrong with depth and exits, and makes no weights
            MultiExitResNet(self.depth, exits=self.exits)

    @property
    def title(self) -> str:
        """What is trained on what, in a line."""
        return f"MultiExitResNet-{self.depth} on {self.data}, {self.epochs} epochs"

    def make_model(self, num_classes: int, in_channels: int) -> MultiExitResNet:
        """Return a new network; its weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return MultiExitResNet(self.depth, num_classes, in_channels, self.exits)
