"""A run's folder: what is written, in what form, and read again.

config.json         the configuration
metrics.jsonl       one line a step and one an epoch
checkpoint.pt       what the run goes on from
logits.safetensors  every exit's logits and the labels, of held-out and test rows
result.json         the scores of every exit on held-out and test rows
*.png               figures

and the trained network, in the form that its kind of network has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from gradalign.errors import missing_extra
from gradalign.multiexit.configs import Config, config_of
from gradalign.multiexit.evaluation import Costs
from gradalign.multiexit.files import read_json, replace_file, write_json

try:
    from safetensors.torch import load_file, save
except ImportError as error:
    raise missing_extra("safetensors", "multiexit") from error

_LOGITS = "logits.safetensors"


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
        run.check_new()
        run.folder.mkdir(parents=True, exist_ok=True)
        write_json(run.folder / "config.json", config.to_dict())
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

    def prepared(self, config: Config) -> Run:
        """Return the run, made where the folder holds none.

        Raises:
            ValueError: The folder holds a run of another configuration.
        """
        if not self.exists:
            return self.create(self.folder, config)
        before, now = self.config.to_dict(), config.to_dict()
        if before != now:
            found = ", ".join(f"{name}={value!r}" for name, value in before.items() if now.get(name) != value)
            raise ValueError(
                f"`out` must be a folder whose runs have this configuration, got {str(self.folder)!r} with {found};"
                " name another folder, or give the same settings to continue."
            )
        return self

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
        return config_of(read_json(path), str(path))

    @property
    def result(self) -> dict[str, Any]:
        """The result of a finished run.

        Raises:
            FileNotFoundError: The run is not finished.
        """
        self.check_finished()
        result: dict[str, Any] = read_json(self.folder / "result.json")
        return result

    @property
    def scores(self) -> list[float]:
        """The main score of each exit of a finished run, (M,), on test rows.

        Raises:
            FileNotFoundError: The run is not finished.
        """
        result = self.result
        scores: list[float] = result[f"test_{result['main']}"]
        return scores

    @property
    def costs(self) -> Costs:
        """The multiply-accumulates of a finished run's network.

        Raises:
            FileNotFoundError: The run is not finished.
            ValueError: It is of an earlier version, which did not tell the heads' costs apart.
        """
        found = self.result["costs"]
        if not isinstance(found, dict):
            raise ValueError(
                f"`run` must have the costs of exits and heads in its result, got {str(self.folder)!r}, a run of an"
                " earlier version with those of exits alone; delete the folder and train again."
            )
        return Costs(**found)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Write what the run goes on from, whole or not at all."""
        replace_file(self.folder / "checkpoint.pt", lambda path: torch.save(dict(state), path))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return what ``save_checkpoint`` wrote, or None before the first time; plain tensors and values alone."""
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return None
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        return state

    def drop_checkpoint(self) -> None:
        """Remove the checkpoint of a finished run, which needs it no more and is three networks large."""
        self.check_finished()
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)

    def save_logits(self, logits: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Write the logits of every exit, (M, N, C), and the labels, (N,), of each split."""
        tensors = {}
        for split, (scores, labels) in logits.items():
            tensors[f"{split}.logits"], tensors[f"{split}.labels"] = scores.contiguous(), labels.contiguous()
        replace_file(self.folder / _LOGITS, lambda path: path.write_bytes(save(tensors)))

    def logits(self, split: str) -> tuple[Tensor, Tensor]:
        """Return the logits of every exit, (M, N, C), and the labels, (N,), of a split of a finished run.

        Raises:
            FileNotFoundError: The run is not finished.
        """
        self.check_finished()
        tensors = load_file(self.folder / _LOGITS)
        return tensors[f"{split}.logits"], tensors[f"{split}.labels"]

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

    def check_new(self) -> None:
        """Raise FileExistsError if the folder holds a run."""
        if self.exists:
            raise FileExistsError(
                f"`out` must be a folder without a run, got {str(self.folder)!r}, which holds one;"
                f" continue it with --resume {self.folder}, or name another folder."
            )

    def check_finished(self) -> None:
        """Raise FileNotFoundError unless the run has been trained to its end."""
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
