"""A run's configuration and its folder: what is written, in what form, and read again.

config.json         the configuration
metrics.jsonl       one line a step and one an epoch
checkpoint.pt       what the run goes on from
model.safetensors   the trained weights
result.json         accuracy of every exit on held-out and test images
*.png               figures
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor, nn

from gradalign.errors import check_seed, finite_number, missing_extra, unknown_name
from gradalign.multiexit import methods
from gradalign.multiexit.methods import Settings
from gradalign.multiexit.objectives import check_count
from gradalign.multiexit.resnet import MultiExitResNet

try:
    from safetensors.torch import load_file, save
except ImportError as error:
    raise missing_extra("safetensors", "multiexit") from error

GRANULARITIES = ("global", "layer", "tensor")


@dataclass(frozen=True)
class Config:
    """Everything that decides how a run comes out.

    Attributes:
        method: A name of ``methods.names()``.
        data: "digits" or the path of an .npz file.
        depth: Of the ResNet, 6n + 2.
        exits: "block", "shallow-deep" or block numbers.
        epochs: Passes over the training images.
        batch_size: Images a step.
        learning_rate: Of SGD, after the warm-up and until 35 % of the steps; a tenth until 60 %, a hundredth until
            85 %, a thousandth then.
        warm_up: Share of the steps in which the learning rate grows linearly.
        momentum: Of SGD.
        weight_decay: Of SGD.
        alpha: Weight of the distillation loss; None, here and below, becomes the method's own default.
        temperature: Of the distillation.
        reduction: "sum" or "mean" over pairs of exits.
        granularity: What shares a Gramian: "global", "layer" (a residual block each) or "tensor".
        seed: Of initial weights, order and augmentation.
    """

    method: str = "gaml-soft"
    data: str = "digits"
    depth: int = 56
    exits: str | tuple[int, ...] = "block"
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.1
    warm_up: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    alpha: float | None = None
    temperature: float | None = None
    reduction: Literal["sum", "mean"] | None = None
    granularity: Literal["global", "layer", "tensor"] = "global"
    seed: int = 0

    def __post_init__(self) -> None:
        defaults = methods.get(self.method).defaults
        for name in ("alpha", "temperature", "reduction"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(defaults, name))
        self._check()

    def _check(self) -> None:
        for name in ("depth", "epochs", "batch_size"):
            check_count(name, getattr(self, name))
        for name in ("learning_rate", "weight_decay"):
            finite_number(name, getattr(self, name), low=0.0)
        for name in ("warm_up", "momentum", "alpha"):
            finite_number(name, getattr(self, name), 0.0, 1.0)
        if finite_number("temperature", self.temperature) <= 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature!r}.")
        self._check_choices()

    def _check_choices(self) -> None:
        check_seed(self.seed)
        if self.reduction not in ("sum", "mean"):
            raise unknown_name("reduction", self.reduction, ["sum", "mean"])
        if self.granularity not in GRANULARITIES:
            raise unknown_name("granularity", self.granularity, GRANULARITIES)
        if isinstance(self.exits, list):
            object.__setattr__(self, "exits", tuple(self.exits))
        with torch.device("meta"):  # says what is wrong with depth and exits, and makes no weights
            MultiExitResNet(self.depth, exits=self.exits)

    @property
    def settings(self) -> Settings:
        """What the method takes."""
        return replace(
            methods.get(self.method).defaults,
            **{name: getattr(self, name) for name in ("alpha", "temperature", "reduction")},
        )

    def make_model(self, num_classes: int, in_channels: int) -> MultiExitResNet:
        """Return a new network; its weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return MultiExitResNet(self.depth, num_classes, in_channels, self.exits)


class Run:
    """A run's folder.

    Args:
        folder: Where it is.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @classmethod
    def create(cls, folder: Path | str, config: Config) -> Run:
        """Make the folder of a new run.

        Raises:
            FileExistsError: The folder holds a run already; it is left as it is.
        """
        run = cls(folder)
        if run.exists:
            raise FileExistsError(
                f"`out` must be a folder without a run, got {str(folder)!r}, which holds one;"
                f" continue it with --resume {folder}, or name another folder."
            )
        run.folder.mkdir(parents=True, exist_ok=True)
        write_json(run.folder / "config.json", asdict(config))
        return run

    @classmethod
    def open(cls, folder: Path | str) -> Run:
        """Return the run in a folder.

        Raises:
            FileNotFoundError: The folder holds no run.
        """
        run = cls(folder)
        if not run.exists:
            if several := sorted(path.parent.name for path in run.folder.glob("*/config.json")):
                raise FileNotFoundError(
                    f"`run` must be the folder of one run, got {str(folder)!r}, which holds"
                    f" {', '.join(several)}; name one."
                )
            raise FileNotFoundError(
                f"`run` must be the folder of a run, got {str(folder)!r}, which has no config.json;"
                " `gradalign train --out FOLDER` makes one."
            )
        return run

    @property
    def exists(self) -> bool:
        """The folder holds a run."""
        return (self.folder / "config.json").is_file()

    @property
    def finished(self) -> bool:
        """The run has been trained to its end."""
        return (self.folder / "result.json").is_file()

    @property
    def config(self) -> Config:
        """The run's configuration.

        Raises:
            ValueError: config.json is not one that ``create`` wrote.
        """
        path = self.folder / "config.json"
        values: dict[str, Any] = _read_json(path)
        known = {f.name for f in fields(Config)}
        if set(values) != known:
            odd = sorted(set(values) ^ known)
            raise ValueError(f"`config` must hold {', '.join(sorted(known))}, got {str(path)!r} that differs in {odd}.")
        return Config(**values)

    @property
    def result(self) -> dict[str, Any]:
        """The result of a finished run.

        Raises:
            FileNotFoundError: The run is not finished.
        """
        self._check_finished()
        result: dict[str, Any] = _read_json(self.folder / "result.json")
        return result

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Write what the run goes on from, whole or not at all."""
        _replace(self.folder / "checkpoint.pt", lambda path: torch.save(dict(state), path))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return what ``save_checkpoint`` wrote, or None before the first time; plain tensors and values alone."""
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return None
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        return state

    def save_model(self, model: nn.Module) -> None:
        """Write the weights."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        _replace(self.folder / "model.safetensors", lambda path: path.write_bytes(save(tensors)))

    def load_model(self, num_classes: int, in_channels: int) -> MultiExitResNet:
        """Return the trained network, in evaluation mode.

        Raises:
            FileNotFoundError: The run is not finished.
        """
        self._check_finished()
        model = self.config.make_model(num_classes, in_channels)
        model.load_state_dict(load_file(self.folder / "model.safetensors"))
        return model.eval()

    def save_result(self, result: Mapping[str, Any]) -> None:
        """Write the result; the run is finished then."""
        write_json(self.folder / "result.json", result)

    def open_metrics(self, size: int) -> IO[bytes]:
        """Open metrics.jsonl for more lines, after dropping those beyond ``size`` bytes: the next steps write them."""
        path = self.folder / "metrics.jsonl"
        path.touch()
        file = path.open("r+b")
        file.truncate(size)
        file.seek(size)
        return file

    def _check_finished(self) -> None:
        if not self.finished:
            raise FileNotFoundError(
                f"`run` must be finished, got {str(self.folder)!r}, which has no result yet;"
                f" `gradalign train --resume {self.folder}` continues it."
            )

    def metrics(self, kind: Literal["step", "epoch"]) -> Iterator[dict[str, Any]]:
        """Yield the lines of one kind."""
        with (self.folder / "metrics.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                if record["kind"] == kind:
                    yield record


def plain(value: object) -> object:
    """Return a value as JSON has it: tensors as lists, what is not finite as null."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, whole or not at all."""
    text = json.dumps(plain(value), indent=2) + "\n"
    _replace(path, lambda new: new.write_text(text, encoding="utf-8"))


def _read_json(path: Path) -> Any:  # noqa: ANN401 (what a file holds is known to its reader)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"`{path.name}` must be JSON, got {str(path)!r} with an error in it: {error}") from error


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside ``path`` and move it there, so that ``path`` is never half written."""
    new = path.with_name(path.name + ".new")
    write(new)
    os.replace(new, path)
