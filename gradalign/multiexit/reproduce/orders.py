"""What is to be reproduced with what, and the runs that it takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gradalign.multiexit.attempts import attempt
from gradalign.multiexit.configs import Config, ImageConfig, TextConfig
from gradalign.multiexit.runs import Run
from gradalign.multiexit.text import glue
from gradalign.multiexit.text.workload import num_layers

_OF_A_RUN = ("method", "seed", "task")  # what a run's folder names; of the rest it has a digest


@dataclass(frozen=True)
class Order:
    """What a user asked for.

    Attributes:
        folder: Holds the runs, in a folder runs, and what is made of them.
        tasks: GLUE tasks; empty takes the paper's for each piece.
        methods: Names of methods, where a piece compares several; empty takes the paper's.
        seeds: One run a method, task and seed.
        settings: Of the configurations, beside method, task and seed: backbone, data_dir, epochs and so on.
        device: Where to compute.
    """

    folder: Path
    tasks: Sequence[str] = ()
    methods: Sequence[str] = ()
    seeds: Sequence[int] = (0,)
    settings: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(glue.task(name).name for name in self.tasks)))
        object.__setattr__(self, "methods", tuple(dict.fromkeys(self.methods)))
        if not self.seeds:
            raise ValueError("`seeds` must hold one at least, got none; take 0.")

    def text(self, method: str, task: str, seed: int, **changed: object) -> TextConfig:
        """Return the configuration of a run on text."""
        values: dict[str, Any] = {**self.settings, **changed}
        return TextConfig(method=method, task=task, seed=seed, **values)

    def each_seed(self, method: str, task: str, **changed: object) -> list[Config]:
        """Return the configurations of a method's runs on a task, one a seed."""
        return [self.text(method, task, seed, **changed) for seed in self.seeds]

    def images(self, method: str, seed: int, **changed: object) -> ImageConfig:
        """Return the configuration of a run on images."""
        values: dict[str, Any] = {**self.settings, **changed}
        return ImageConfig(method=method, seed=seed, **values)

    def depth(self, task: str) -> int:
        """Return how many exits a network has on a task: one a layer of the backbone."""
        return num_layers(self.text("joint", task, 0))

    def run(self, config: Config) -> Run:
        """Return the run of a configuration, in whose folder there may be nothing yet; pieces share runs."""
        values = config.to_dict()
        rest = {name: value for name, value in values.items() if name not in _OF_A_RUN}
        digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:8]
        task = values["task"] if isinstance(config, TextConfig) else Path(values["data"]).stem
        return Run(self.folder / "runs" / task / f"{config.method.replace(':', '-')}-{digest}-seed{config.seed}")

    def finished(self, configs: Iterable[Config]) -> list[Run]:
        """Return those of the runs that are finished."""
        return [run for run in map(self.run, configs) if run.finished]

    def train(self, configs: Sequence[Config]) -> None:
        """Train what is not finished, seed by seed, so that a stop leaves whole comparisons.

        A run that diverges is told of on standard error and stays unfinished. Checkpoints of finished runs are removed.

        Raises:
            Interrupted: Ctrl-C; the same call goes on.
        """
        for config in sorted(configs, key=lambda config: config.seed):
            run = self.run(config)
            if attempt(run.prepared(config), self.device):
                run.drop_checkpoint()


@dataclass(frozen=True)
class Piece:
    """A table or figure of the paper.

    Attributes:
        summary: What it shows.
        needs: Names the runs that it takes.
        make: Makes of the finished ones what there is to see, and returns the files.
        kind: Of the runs: "text" or "images".
        compares: Whether it takes ``Order.methods``.
        sets: Settings that it decides itself.
    """

    summary: str
    needs: Callable[[Order], list[Config]]
    make: Callable[[Order, Path], list[Path]]
    kind: str = "text"
    compares: bool = True
    sets: tuple[str, ...] = ()
