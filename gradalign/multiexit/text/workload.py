"""Training of ``MultiExitEncoder`` on a GLUE task: batches, AdamW, its schedule, and what the exits score.

Shapes: M exits, N rows, C classes, L tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gradalign.errors import missing_extra
from gradalign.multiexit.configs import TextConfig
from gradalign.multiexit.evaluation import Costs
from gradalign.multiexit.inference import evaluating
from gradalign.multiexit.text import backbones, glue, scores
from gradalign.multiexit.text.batches import Encoded, collate, encode, epoch_order, in_order
from gradalign.multiexit.text.encoder import MultiExitEncoder
from gradalign.multiexit.workloads import SplitName, Workload, generator

try:
    from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
except ImportError as error:
    raise missing_extra("transformers", "text") from error

_EVALUATED = 64  # rows of a batch that is only judged
_FUSED = ("cpu", "cuda")  # where AdamW in one pass was tried: on one core it takes a fifth of the time
MODEL = "model"
"""The folder of the trained network and its tokenizer, in a run's."""


class TextWorkload(Workload):
    """A GLUE task for an encoder with exits.

    Args:
        config: The run's configuration.
        device: Where to compute.
    """

    def __init__(self, config: TextConfig, device: torch.device) -> None:
        self.config: TextConfig = config
        self.device = device
        self.task = glue.task(config.task)
        self.main = self.task.main
        self.exit = str(config.exit)  # the method's own where none was given
        part = {} if config.folds is None else {"folds": config.folds, "fold": config.fold}
        data = glue.load(config.task, config.data_dir, max_train=config.max_train, **part)
        self.tokenizer, self.backbone = _read(config.backbone)
        self.train, self.held_out, self.test = (
            encode(split, self.tokenizer, config.max_length) for split in (data.train, data.held_out, data.dev)
        )
        longest = max(int(rows.lengths.max()) for rows in (self.train, self.held_out, self.test))
        limit = backbones.longest(self.backbone)
        if longest > limit:
            raise ValueError(
                f"`max_length` must be at most {limit}, what the backbone takes, got rows of {longest} tokens."
            )
        self.steps_an_epoch = -(-len(self.train) // config.batch_size)
        self._order: tuple[int, list[Tensor]] = (-1, [])

    def make_model(self) -> MultiExitEncoder:
        """Return the encoder with new exits, on the device; what is drawn depends on the seed alone."""
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            if config.pretrained:
                model = MultiExitEncoder.from_pretrained(
                    config.backbone, num_labels=self.task.num_classes, exit=self.exit, dtype=torch.float32
                )
            else:
                model = MultiExitEncoder.from_config(self.backbone, num_labels=self.task.num_classes, exit=self.exit)
        if self.task.labels:
            model.config.id2label = dict(enumerate(self.task.labels))
            model.config.label2id = {label: number for number, label in enumerate(self.task.labels)}
        return self._placed(model)

    def make_optimizer(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> Optimizer:
        """Return AdamW, with weight decay for matrices alone."""
        listed = list(parameters)
        matrices, vectors = [p for p in listed if p.ndim > 1], [p for p in listed if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        fused = True if self.device.type in _FUSED else None  # None leaves it to torch
        return AdamW([group for group in groups if group["params"]], learning_rate, fused=fused)

    def learning_rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0, of so many."""
        return learning_rate(self.config.learning_rate, self.config.warm_up * self.steps_an_epoch, step, steps)

    def batch(self, step: int, rank: int, ranks: int) -> tuple[dict[str, Tensor], Tensor, float]:
        """Return a rank's part of a step's batch: every so-manieth row, and the first where none is left for it."""
        epoch, index = divmod(step, self.steps_an_epoch)
        if self._order[0] != epoch:
            order = epoch_order(
                self.train.lengths,
                self.config.batch_size,
                generator(self.config.seed, "order", epoch),
                buckets=self.config.buckets,
            )
            self._order = (epoch, order)
        rows = self._order[1][index]
        part = rows[rank::ranks]
        share = len(part) / len(rows)
        return *self._inputs(self.train, part if len(part) else rows[:1]), share

    def layers(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Return the parameters of each layer with the exit after it; the embeddings' are with the first."""
        return cast(MultiExitEncoder, model).layer_blocks()

    def trunk(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of embeddings and layers."""
        return list(cast(MultiExitEncoder, model).backbone.parameters())

    @torch.no_grad()
    def logits(self, model: nn.Module, split: SplitName) -> tuple[Tensor, Tensor]:
        """Return the logits of every exit, (M, N, C), and the labels, (N,), both on the CPU."""
        rows = self.held_out if split == "held_out" else self.test
        order, places = in_order(rows.lengths, _EVALUATED)
        with evaluating(model):
            logits = [model(**self._inputs(rows, batch)[0]).float().cpu() for batch in order]
        return torch.cat(logits, dim=1)[:, places], rows.labels

    def scores(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the task's scores of each exit."""
        return scores.score(self.task, logits, labels)

    def rows(self, split: SplitName, count: int) -> Iterator[dict[str, Tensor]]:
        """Yield the first rows of a split, one at a time, on the device."""
        part = self.held_out if split == "held_out" else self.test
        for row in torch.arange(min(count, len(part))).split(1):
            yield self._inputs(part, row)[0]

    def depth(self, model: nn.Module) -> int:
        """Return how many layers a network has."""
        return cast(MultiExitEncoder, model).exit_layers[-1]

    def whole(self) -> tuple[int, float]:
        """Return the layers of the backbone, and the mean multiply-accumulates of a test row with its last exit."""
        with torch.device("meta"):
            model = MultiExitEncoder.from_config(
                self.backbone, num_labels=self.task.num_classes, exit=self.exit, exits=[]
            )
        return self.depth(model), self.costs(model).bare

    def costs(self, model: nn.Module) -> Costs:
        """Return the multiply-accumulates of a test row, the mean over their lengths."""
        encoder = cast(MultiExitEncoder, model)
        lengths, counts = self.test.lengths.unique(return_counts=True)
        total = torch.zeros(2, encoder.num_exits, dtype=torch.float64)
        for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
            macs = [encoder.exit_macs(length), encoder.exit_macs(length, heads=False)]
            total += count * torch.tensor(macs, dtype=torch.float64)
        exits, alone = total / len(self.test)
        return Costs(exits.tolist(), (exits - alone).diff().tolist())

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the network and its tokenizer to a folder model."""
        new = folder / (MODEL + ".new")
        shutil.rmtree(new, ignore_errors=True)  # a stop may have left a part
        cast(MultiExitEncoder, model).save_pretrained(new)
        self.tokenizer.save_pretrained(new)
        shutil.rmtree(folder / MODEL, ignore_errors=True)
        new.rename(folder / MODEL)

    def load(self, folder: Path) -> MultiExitEncoder:
        """Return the trained network, on the device, in evaluation mode."""
        return self._placed(MultiExitEncoder.from_pretrained(folder / MODEL))

    def _placed(self, model: MultiExitEncoder) -> MultiExitEncoder:
        nn.Module.to(model, self.device)
        return model

    def _inputs(self, split: Encoded, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        inputs = collate(split, rows)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}, split.labels[rows].to(self.device)


def _read(backbone: str) -> tuple[Any, PretrainedConfig]:
    """Return the tokenizer and the configuration of a backbone."""
    if Path(backbone).is_absolute() and not Path(backbone).is_dir():  # the hub's word on it would be of names
        raise FileNotFoundError(f"`backbone` must be a folder that is there, or a name on the hub, got {backbone!r}.")
    try:
        return AutoTokenizer.from_pretrained(backbone), AutoConfig.from_pretrained(backbone)
    except (OSError, ValueError) as error:  # several lines, of which the first says what is wrong
        reason = str(error).strip().splitlines()[0].rstrip(".:, ")
        raise ValueError(
            f"`backbone` must be a folder with an encoder and its tokenizer, or such a name on the hub, got"
            f" {backbone!r}: {reason}."
        ) from error


def num_layers(config: TextConfig) -> int:
    """Return how many layers the backbone of a configuration has."""
    return int(AutoConfig.from_pretrained(config.backbone).num_hidden_layers)


def learning_rate(start: float, grows: float, step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0: linear growth over ``grows`` steps, then linear decay to 0.

    >>> [round(learning_rate(1.0, 2, step, 6), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    grows = min(grows, steps)
    if step < grows:
        return start * min(1.0, (step + 1) / grows)
    return start * (steps - step) / max(steps - grows, 1.0)
