"""Training of ``MultiExitResNet`` on images: batches, SGD, its schedule, and what the exits score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from gradalign.errors import missing_extra
from gradalign.multiexit import data as images
from gradalign.multiexit.configs import ImageConfig
from gradalign.multiexit.data import ImageData
from gradalign.multiexit.evaluation import Costs
from gradalign.multiexit.files import replace_file
from gradalign.multiexit.inference import evaluating
from gradalign.multiexit.metrics import exit_accuracies, exit_macs
from gradalign.multiexit.resnet import MultiExitResNet
from gradalign.multiexit.workloads import SplitName, Workload, generator

try:
    from safetensors.torch import load_file, save
except ImportError as error:
    raise missing_extra("safetensors", "multiexit") from error

_BATCH = 256
_FILE = "model.safetensors"
_MILESTONES = (0.35, 0.6, 0.85)  # of all steps: the learning rate falls to a tenth at each


class ImageWorkload(Workload):
    """Images for a ResNet with exits.

    Args:
        config: The run's configuration.
        device: Where to compute.
        data: The images; read from ``config.data`` if left out.
    """

    main = "accuracy"

    def __init__(self, config: ImageConfig, device: torch.device, data: ImageData | None = None) -> None:
        self.config: ImageConfig = config
        self.device = device
        self.data = images.load(config.data) if data is None else data
        self.steps_an_epoch = -(-len(self.data.train) // config.batch_size)

    def make_model(self) -> MultiExitResNet:
        """Return a new network on the device; its weights depend on the seed alone."""
        return self.config.make_model(self.data.num_classes, self.data.in_channels).to(self.device)

    def make_optimizer(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimizer:
        """Return SGD with momentum."""
        config = self.config
        return SGD(parameters, learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)

    def learning_rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0, of so many."""
        return learning_rate(self.config.learning_rate, self.config.warm_up, step, steps)

    def batch(self, step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor, float]:
        """Return a step's images, flipped and cropped, and their labels."""
        if ranks > 1:
            raise ValueError(
                f"`torchrun` must start one process for images, got {ranks}: each would keep its own normalisation."
            )
        epoch, index = divmod(step, self.steps_an_epoch)
        order = torch.randperm(len(self.data.train), generator=generator(self.config.seed, "order", epoch))
        rows = order[index * self.config.batch_size : (index + 1) * self.config.batch_size]
        pixels = self.data.augment(self.data.train.images[rows], generator(self.config.seed, "augmentation", step))
        return self.data.inputs(pixels.to(self.device)), self.data.train.labels[rows].to(self.device), 1.0

    def layers(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Return the parameters of each residual block; those of stem and heads are a block by themselves."""
        return [list(block.parameters()) for block in cast(MultiExitResNet, model).blocks]

    def trunk(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of stem and blocks."""
        network = cast(MultiExitResNet, model)
        return [*network.stem.parameters(), *network.blocks.parameters()]

    @torch.no_grad()
    def logits(self, model: nn.Module, split: SplitName) -> tuple[Tensor, Tensor]:
        """Return the logits of every exit, (M, N, C), and the labels, (N,), both on the CPU."""
        part = self.data.held_out if split == "held_out" else self.data.test
        with evaluating(model):
            logits = [model(self.data.inputs(pixels.to(self.device))).cpu() for pixels in part.images.split(_BATCH)]
        return torch.cat(logits, dim=1), part.labels

    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the accuracy of each exit."""
        return {self.main: exit_accuracies(logits, labels)}

    def rows(self, split: SplitName, count: int) -> Iterator[Tensor]:
        """Yield the first images of a split, one at a time, on the device."""
        part = self.data.held_out if split == "held_out" else self.data.test
        for pixels in part.images[:count].split(1):
            yield self.data.inputs(pixels.to(self.device))

    def depth(self, model: nn.Module) -> int:
        """Return how many residual blocks a network has."""
        return len(cast(MultiExitResNet, model).blocks)

    def whole(self) -> tuple[int, float]:
        """Return the blocks of the network without exits, and its multiply-accumulates."""
        model = self.config.make_model(self.data.num_classes, self.data.in_channels)
        return self.depth(model), exit_macs(model, self.data.image_size, heads=False)[-1]

    def costs(self, model: nn.Module) -> Costs:
        """Return the multiply-accumulates of an image, which has one size."""
        network, size = cast(MultiExitResNet, model), self.data.image_size
        exits, trunk = exit_macs(network, size), exit_macs(network, size, heads=False)
        heads = [cost - layers for cost, layers in zip(exits[:-1], trunk[:-1], strict=True)]  # of all up to there
        return Costs(exits, [after - before for before, after in pairwise([0, *heads])])

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the weights to model.safetensors."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        replace_file(folder / _FILE, lambda path: path.write_bytes(save(tensors)))

    def load(self, folder: Path) -> MultiExitResNet:
        """Return the trained network, on the device, in evaluation mode."""
        model = self.make_model()
        model.load_state_dict(load_file(folder / _FILE))
        return model.eval()


def learning_rate(start: float, warm_up: float, step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0.

    It grows linearly to ``start`` over a share ``warm_up`` of the steps, and falls to a tenth at 35 %, 60 % and 85 % of
    them, as in 100 epochs of Shallow-Deep Networks (Kaya et al., arXiv:1810.07052). Those have no warm-up; 27 exits at
    0.1 without one did not leave chance on CIFAR-10 before the first of these falls.

    >>> [round(learning_rate(0.1, 0.1, step, 100), 6) for step in (0, 4, 9, 34, 35, 60, 85)]
    [0.01, 0.05, 0.1, 0.1, 0.01, 0.001, 0.0001]
    """
    grown = min(1.0, (step + 1) / max(warm_up * steps, 1.0))
    return start * grown / 10.0 ** sum(step >= share * steps for share in _MILESTONES)
