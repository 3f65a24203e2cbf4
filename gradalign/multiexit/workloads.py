"""What a run trains: a network, its data in batches, its optimizer and schedule, and how it is judged.

Shapes: M exits, N rows, C classes.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradalign.multiexit.configs import Config, ImageConfig, TextConfig
from gradalign.multiexit.evaluation import Costs
from gradalign.multiexit.inference import Inputs

SplitName = Literal["held_out", "test"]


class Workload(ABC):
    """The part of a run that its kind decides.

    What a step does depends on the configuration and the step's number alone, so that a run that was stopped goes on
    with the same bits.

    Attributes:
        main: The name of the score that runs are compared by.
        config: The run's configuration.
        steps_an_epoch: How many batches the training rows make.
        device: Where to compute.
    """

    main: str
    config: Config
    steps_an_epoch: int
    device: torch.device

    @abstractmethod
    def make_model(self) -> nn.Module:
        """Return a new network on the device; its weights depend on the configuration alone."""

    @abstractmethod
    def make_optimizer(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimizer:
        """Return a new optimizer."""

    @abstractmethod
    def learning_rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0, of so many."""

    @abstractmethod
    def batch(self, step: int, rank: int, ranks: int) -> tuple[Inputs, Tensor, float]:
        """Return a rank's part of a step's batch, on the device: inputs, labels and its share of the batch's rows."""

    @abstractmethod
    def layers(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Return the parameters layer by layer, for a Gramian a layer."""

    @abstractmethod
    def trunk(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of no exit."""

    @abstractmethod
    def logits(self, model: nn.Module, split: SplitName) -> tuple[Tensor, Tensor]:
        """Return the logits of every exit, (M, N, C), and the labels, (N,), both on the CPU."""

    @abstractmethod
    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return each score by name, (M,)."""

    @abstractmethod
    def rows(self, split: SplitName, count: int) -> Iterator[Inputs]:
        """Yield the inputs of the first rows of a split, a batch of one each, on the device."""

    @abstractmethod
    def depth(self, model: nn.Module) -> int:
        """Return how many layers a network has."""

    @abstractmethod
    def whole(self) -> tuple[int, float]:
        """Return the layers of the network without exits that the run began with, and its multiply-accumulates."""

    @abstractmethod
    def costs(self, model: nn.Module) -> Costs:
        """Return the multiply-accumulates of a test row, the mean where they differ."""

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a trained network, whole or not at all."""

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """Return the network that ``save`` wrote, on the device, in evaluation mode."""


def workload_of(config: Config, device: torch.device | str = "cpu") -> Workload:
    """Return what a configuration trains; its data is read.

    Raises:
        FileNotFoundError: There are no such data.
        ValueError: The data are not as they must be.
    """
    if isinstance(config, ImageConfig):
        from gradalign.multiexit.images import ImageWorkload  # noqa: PLC0415 (needs extras, each kind its own)

        return ImageWorkload(config, torch.device(device))
    if isinstance(config, TextConfig):
        from gradalign.multiexit.text.workload import TextWorkload  # noqa: PLC0415

        return TextWorkload(config, torch.device(device))
    raise TypeError(f"`config` must be of a known kind, got {type(config).__name__}.")


def judge_of(config: Config) -> Callable[[Tensor, Tensor], float]:
    """Return the main score of a configuration's task, a function of answers (N,) and labels (N,)."""
    if isinstance(config, TextConfig):
        from gradalign.multiexit.text import glue, scores  # noqa: PLC0415 (needs scikit-learn, for text alone)

        task = glue.task(config.task)
        return lambda answers, labels: scores.score_answers(task, answers, labels)[task.main]
    return lambda answers, labels: float((answers == labels).double().mean())


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """Return a generator that depends on these three alone."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, number))


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """Return a seed that depends on these three alone; a string seeds well whatever its digits."""
    return random.Random(f"{seed}/{purpose}/{number}").getrandbits(32)
