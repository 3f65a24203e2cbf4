"""Train a multi-exit network step by step, so that a stop at any step loses nothing and changes no bit."""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any

import torch
from torch import Tensor

from gradalign import AlignmentReport, GradientAligner, NonFiniteError
from gradalign.errors import missing_extra
from gradalign.multiexit import methods
from gradalign.multiexit.data import ImageData
from gradalign.multiexit.evaluation import exit_logits
from gradalign.multiexit.metrics import exit_accuracies
from gradalign.multiexit.resnet import MultiExitResNet
from gradalign.multiexit.runs import Config, Run, plain

try:
    from tqdm import tqdm
except ImportError as error:
    raise missing_extra("tqdm", "multiexit") from error

_MILESTONES = (0.35, 0.6, 0.85)  # of all steps: the learning rate falls to a tenth at each


class Interrupted(Exception):  # noqa: N818 (not an error: the run can go on)
    """Training was stopped by Ctrl-C, after a whole step and with a checkpoint.

    Attributes:
        run: The run.
        step: How many steps it has done.
    """

    def __init__(self, run: Run, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.run = run
        self.step = step


def train(run: Run, data: ImageData, device: torch.device | str = "cpu") -> None:
    """Train a run to its end, from its checkpoint where it has one.

    A step depends on the configuration, the weights, the optimizer and the step's number, and on no generator that
    was drawn from before: so a run that was stopped and continued gives the bits of one that was not.

    Args:
        run: A new run, or one that was stopped.
        data: Its images.
        device: Where to compute.

    Raises:
        Interrupted: Ctrl-C; a checkpoint has been written.
        NonFiniteError: A loss's gradient is not finite; the last checkpoint stands.
    """
    if run.finished:
        tqdm.write(f"{run.folder}: trained already; delete the folder to train again", file=sys.stderr)
        return
    with _Training(run, data, torch.device(device)) as training, _catch_interrupt() as interrupted:
        training.go(interrupted)


class _Training:
    """A run in progress: the network, its optimizer, the step reached, and the open metrics file."""

    def __init__(self, run: Run, data: ImageData, device: torch.device) -> None:
        self.run, self.data, self.device = run, data, device
        self.config: Config = run.config
        self.method = methods.get(self.config.method)
        self.model = self.config.make_model(data.num_classes, data.in_channels).to(device)
        self.optimizer = GradientAligner(
            torch.optim.SGD(
                self.model.parameters(),
                self.config.learning_rate,
                momentum=self.config.momentum,
                weight_decay=self.config.weight_decay,
            ),
            self.method.rule(self.config.settings),
            granularity=_blocks(self.model, self.config.granularity),
        )
        self.steps_an_epoch = -(-len(data.train) // self.config.batch_size)
        self.steps = self.config.epochs * self.steps_an_epoch
        self.step, self.seconds, metrics_size = 0, 0.0, 0
        if (saved := run.load_checkpoint()) is not None:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.seconds, metrics_size = saved["step"], saved["seconds"], saved["metrics_size"]
        self.metrics: IO[bytes] = run.open_metrics(metrics_size)

    def __enter__(self) -> _Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()

    def go(self, interrupted: threading.Event) -> None:
        """Do the steps that are left."""
        title = f"{self.config.method} seed {self.config.seed}"
        started = time.monotonic() - self.seconds
        with tqdm(total=self.steps, initial=self.step, desc=title, unit="step", disable=None) as bar:
            while self.step < self.steps:
                try:
                    losses = self._step()
                except NonFiniteError as error:
                    raise NonFiniteError(
                        f"{title} diverged at step {self.step + 1}: the gradient of {' and '.join(error.groups)} must"
                        " be finite, got NaN or infinity; take a lower learning rate or a longer warm-up, in another"
                        " folder.",
                        error.groups,
                    ) from error
                self.step += 1
                self.seconds = time.monotonic() - started
                bar.update()
                bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()}, refresh=False)
                if self.step % self.steps_an_epoch == 0:
                    self._end_epoch(bar, title)
                if interrupted.is_set():
                    self._checkpoint()
                    raise Interrupted(self.run, self.step)
        self._finish()

    def _step(self) -> dict[str, float]:
        """Train on the next batch and write the step's line."""
        epoch, index = divmod(self.step, self.steps_an_epoch)
        order = torch.randperm(len(self.data.train), generator=_generator(self.config.seed, "order", epoch))
        rows = order[index * self.config.batch_size : (index + 1) * self.config.batch_size]
        images = self.data.augment(
            self.data.train.images[rows], _generator(self.config.seed, "augmentation", self.step)
        )
        labels = self.data.train.labels[rows].to(self.device)
        rate = learning_rate(self.config.learning_rate, self.config.warm_up, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        self.model.train()
        logits = self.model(self.data.inputs(images.to(self.device)))
        losses = self.method.objective(logits, labels, self.config.settings)
        self.optimizer.zero_grad()
        self.optimizer.backward(losses)
        self.optimizer.step()
        values = {name: loss.item() for name, loss in losses.items()}
        self._write_step(epoch, rate, values, exit_accuracies(logits.detach(), labels))
        return values

    def _write_step(self, epoch: int, rate: float, losses: dict[str, float], accuracy: Tensor) -> None:
        report = self.optimizer.report
        if report is None:
            raise RuntimeError("backward() must come before its report is written.")
        whole = _whole(report)
        record = {
            "kind": "step",
            "step": self.step + 1,
            "epoch": epoch + 1,
            "learning_rate": rate,
            "groups": list(report.names),
            "losses": losses,
            "accuracy": accuracy,
            "norms": whole.norms,
            "cosines": whole.cosines,
            "angles": whole.angles,
            "conflicts": whole.conflicts,
            "weights": report.weights,
            "reversals": report.reversals,
        }
        self._write(record)

    def _end_epoch(self, bar: tqdm, title: str) -> None:
        """Write the epoch's line and a checkpoint, and say how far it is where no bar is shown."""
        epoch = self.step // self.steps_an_epoch
        accuracy = exit_accuracies(*exit_logits(self.model, self.data, self.data.held_out))
        self._write({"kind": "epoch", "step": self.step, "epoch": epoch, "held_out_accuracy": accuracy})
        self._checkpoint()
        if bar.disable:
            left = self.seconds / self.step * (self.steps - self.step)
            tqdm.write(
                f"{title}: epoch {epoch}/{self.config.epochs}, held-out accuracy {float(accuracy.mean()):.3f} over"
                f" exits, {float(accuracy[-1]):.3f} at the last, {left:.0f} s left",
                file=sys.stderr,
            )

    def _write(self, record: dict[str, Any]) -> None:
        self.metrics.write((json.dumps(plain(record)) + "\n").encode())

    def _checkpoint(self) -> None:
        self.metrics.flush()
        self.run.save_checkpoint(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "metrics_size": self.metrics.tell(),
            }
        )

    def _finish(self) -> None:
        self.metrics.flush()
        self.run.save_model(self.model)
        splits = {"held_out": self.data.held_out, "test": self.data.test}
        accuracies = {
            f"{name}_accuracy": exit_accuracies(*exit_logits(self.model, self.data, split))
            for name, split in splits.items()
        }
        self.run.save_result({"steps": self.steps, "seconds": self.seconds, **accuracies})


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


def _whole(report: AlignmentReport) -> AlignmentReport:
    """Return the report of all blocks as one: squared norms and products add up over parameters."""
    if report.gramian.ndim == 2:
        return report
    return AlignmentReport(report.names, report.gramian.sum(0), report.weights, report.skipped)


def _blocks(model: MultiExitResNet, granularity: str) -> Any:  # noqa: ANN401 (an argument of the aligner)
    if granularity == "layer":
        return [list(block.parameters()) for block in model.blocks]
    return granularity


def _generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """Return a generator that depends on these three alone; a string seeds well whatever its digits."""
    return torch.Generator().manual_seed(random.Random(f"{seed}/{purpose}/{number}").getrandbits(32))


@contextmanager
def _catch_interrupt() -> Iterator[threading.Event]:
    """Set an event at the first Ctrl-C, so that the step is finished; a second one stops at once."""
    interrupted = threading.Event()

    def once(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield interrupted
        return
    previous = signal.signal(signal.SIGINT, once)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
