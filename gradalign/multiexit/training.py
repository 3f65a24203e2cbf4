"""Train a multi-exit network step by step, so that a stop at any step loses nothing and changes no bit."""

from __future__ import annotations

import copy
import io
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import IO, Any

import torch
from torch import Tensor, nn

from gradalign import AlignmentReport, GradientAligner, NonFiniteError
from gradalign.errors import missing_extra
from gradalign.multiexit import methods, processes
from gradalign.multiexit.files import plain
from gradalign.multiexit.inference import Inputs
from gradalign.multiexit.interrupts import Interrupted, catch_interrupt
from gradalign.multiexit.methods import Stage, Step
from gradalign.multiexit.methods.networks import frozen_modules
from gradalign.multiexit.metrics import exit_accuracies
from gradalign.multiexit.records import alignment
from gradalign.multiexit.runs import Run
from gradalign.multiexit.workloads import SplitName, Workload, derived_seed

try:
    from tqdm import tqdm
except ImportError as error:
    raise missing_extra("tqdm", "multiexit") from error

__all__ = ["Interrupted", "train"]

_SPLITS: tuple[SplitName, ...] = ("held_out", "test")


Watch = Callable[[dict[str, Any], AlignmentReport | None], None]
"""Sees each line that goes into metrics.jsonl, and with a step's line the report of its alignment."""


def train(run: Run, workload: Workload, watch: Watch | None = None) -> None:
    """Train a run to its end, from its checkpoint where it has one.

    A step depends on the configuration, the weights, the optimizer and the step's number, and on no generator that
    was drawn from before: so a run that was stopped and continued gives the bits of one that was not.

    Args:
        run: A new run, or one that was stopped.
        workload: What it trains.
        watch: Is shown what is written, as it is written.

    Raises:
        Interrupted: Ctrl-C; a checkpoint has been written.
        NonFiniteError: A loss's gradient is not finite; the last checkpoint stands.
    """
    if run.finished:
        tqdm.write(f"{run.folder}: trained already; delete the folder to train again", file=sys.stderr)
        return
    with _Training(run, workload, watch) as training:
        with catch_interrupt() as interrupted:
            training.go(interrupted)
        training.finish()  # Ctrl-C ends it at once: the last epoch's checkpoint stands, and no result is written


class _Training:
    """A run in progress: the network, the stage and its optimizer, the step reached, and the open metrics file."""

    model: nn.Module
    teacher: nn.Module | None
    optimizer: GradientAligner

    def __init__(self, run: Run, workload: Workload, watch: Watch | None = None) -> None:
        self.watch = watch
        self.run, self.work, self.config = run, workload, workload.config
        self.method = methods.get(self.config.method)
        self.title = self.config.run_name
        self.model, self.teacher = workload.make_model(), None
        self.stages_done: list[int] = []  # how many steps each took
        self.seconds, metrics_size = 0.0, 0
        saved = run.load_checkpoint()
        self._enter(0)
        if saved is not None:
            while len(self.stages_done) < len(saved["stages_done"]):
                self._enter(len(self.stages_done) + 1, saved["stages_done"][len(self.stages_done)])
            self._restore(saved)
            self.seconds, metrics_size = saved["seconds"], saved["metrics_size"]
        self.writes = processes.rank() == 0  # of several processes the first alone writes
        self.metrics: IO[bytes] = run.open_metrics(metrics_size) if self.writes else io.BytesIO()

    @property
    def stage(self) -> Stage:
        """The stage that is trained now."""
        return self.method.stages[len(self.stages_done)]

    @property
    def steps_before(self) -> int:
        """How many steps the stages before took."""
        return sum(self.stages_done)

    def __enter__(self) -> _Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()

    def _enter(self, number: int, steps_before: int | None = None) -> None:
        """Make network, optimizer and schedule of a stage, from the network as the stage before left it."""
        if steps_before is not None:
            self.stages_done.append(steps_before)
        stage, config = self.method.stages[number], self.config
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False) if stage.has_teacher else None
        self.model = stage.prepare(self.work.make_model() if stage.begins_anew else self.model, config.settings)
        trained = list(stage.trains(self.model))
        self.model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        self.frozen = frozen_modules(self.model)
        self.optimizer = GradientAligner(
            self.work.make_optimizer(trained, config.learning_rate * stage.learning_rate),
            stage.rule(config.settings),
            granularity=self._granularity(),
            scope=self._scope(),
        )
        self.memory: dict[str, Tensor] = {}
        self.step, self.best_epoch = 0, 0
        self.best_score: float = -float("inf")
        self.best: dict[str, Tensor] | None = None
        self.steps = max(1, round(config.epochs * stage.epochs)) * self.work.steps_an_epoch

    def _granularity(self) -> Any:  # noqa: ANN401 (an argument of the aligner)
        if self.config.granularity != "layer":
            return self.config.granularity
        layers = ([p for p in layer if p.requires_grad] for layer in self.work.layers(self.model))
        return [layer for layer in layers if layer]

    def _scope(self) -> Any:  # noqa: ANN401 (an argument of the aligner)
        trunk = [p for p in self.work.trunk(self.model) if p.requires_grad] if self.config.scope == "trunk" else []
        return trunk or "all"  # where the trunk is frozen, nothing is left to tell apart

    def _restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        if self.teacher is not None:
            self.teacher.load_state_dict(saved["teacher"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.memory = saved["step"], saved["memory"]
        self.best, self.best_score, self.best_epoch = saved["best"], saved["best_score"], saved["best_epoch"]

    def go(self, interrupted: threading.Event) -> None:
        """Do the stages and steps that are left."""
        while True:
            self._train_stage(interrupted)
            if self.best is not None:
                self.model.load_state_dict(self.best)
            if len(self.stages_done) + 1 == len(self.method.stages):
                break
            self._enter(len(self.stages_done) + 1, self.step)
            self._checkpoint()
        self._stop_if(interrupted)  # between the last step's look and here, say

    def _train_stage(self, interrupted: threading.Event) -> None:
        with tqdm(total=self.steps, initial=self.step, desc=self._name(), unit="step", disable=None) as bar:
            while self.step < self.steps and not self._has_stopped():
                started = time.monotonic()
                try:
                    losses = self._step()
                except NonFiniteError as error:
                    raise NonFiniteError(
                        f"{self.title} diverged at step {self.steps_before + self.step + 1}: the gradient of"
                        f" {' and '.join(error.groups)} must be finite, got NaN or infinity; take a lower learning rate"
                        " or a longer warm-up, in another folder.",
                        error.groups,
                    ) from error
                self.step += 1
                self.seconds += time.monotonic() - started
                bar.update()
                bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()}, refresh=False)
                if self.step % self.work.steps_an_epoch == 0:
                    self._end_epoch(bar)
                self._stop_if(interrupted)

    def _stop_if(self, interrupted: threading.Event) -> None:
        if processes.any_rank(interrupted.is_set(), self.work.device):
            self._checkpoint()
            raise Interrupted(self.run, self.steps_before + self.step)

    def _name(self) -> str:
        several = len(self.method.stages) > 1
        return self.title + (f" stage {len(self.stages_done) + 1}" if several else "")

    def _has_stopped(self) -> bool:
        """No epoch has been better for as long as the patience lasts."""
        patience = self.config.patience
        return patience is not None and self.step // self.work.steps_an_epoch - self.best_epoch >= patience

    def _step(self) -> dict[str, float]:
        """Train on the next batch and write the step's line."""
        number = self.steps_before + self.step
        rank, ranks = processes.rank(), processes.ranks()
        inputs, labels, share = self.work.batch(number, rank, ranks)
        rate = self.work.learning_rate(self.step, self.steps) * self.stage.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        for module in self.frozen:
            module.training = False
        device = self.work.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(derived_seed(self.config.seed, f"dropout {rank}", number))
            with torch.autocast(device.type, torch.bfloat16) if self.config.precision == "bfloat16" else nullcontext():
                made = self.stage.forward(self.model, inputs, self.config.settings)
                logits, states = made if isinstance(made, tuple) else (made, None)
                losses = self.stage.objective(self._seen(logits, labels, inputs, states))
            self.optimizer.zero_grad()
            # Averaged over the ranks, these are the means over all rows of the batch.
            parts = {name: loss * (share * ranks) for name, loss in losses.items()} if ranks > 1 else losses
            self.optimizer.backward(parts)  # in here, for checkpointed layers draw again
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.config.clip)
        self.optimizer.step()
        # Weighted like the gradients: what is written is of the whole batch.
        right = None if labels.is_floating_point() else exit_accuracies(logits.detach(), labels) * (share * ranks)
        several = [loss.detach().float() for loss in parts.values()]
        means = processes.mean(torch.stack([*several, *(() if right is None else right)]))
        values = dict(zip(parts, means.tolist(), strict=False))
        self._write_step(rate, values, None if right is None else means[len(parts) :])
        return values

    def _seen(self, logits: Tensor, labels: Tensor, inputs: Inputs, states: Tensor | None) -> Step:
        """Return what the objective makes its losses of."""
        an_epoch = self.work.steps_an_epoch
        return Step(
            logits,
            labels,
            self.config.settings,
            number=self.step,
            epoch=self.step // an_epoch + 1,
            epochs=self.steps // an_epoch,
            memory=self.memory,
            model=self.model,
            inputs=inputs,
            teacher=self.teacher,
            states=states,
        )

    def _write_step(self, rate: float, losses: dict[str, float], accuracy: Tensor | None) -> None:
        self._write(
            {
                "kind": "step",
                "step": self.steps_before + self.step + 1,
                "epoch": self.step // self.work.steps_an_epoch + 1,
                "stage": len(self.stages_done) + 1,
                "learning_rate": rate,
                "losses": losses,
                "accuracy": accuracy,
                **alignment(self.optimizer),
            }
        )

    def _end_epoch(self, bar: tqdm) -> None:
        """Judge the network, write the epoch's line and a checkpoint, and say how far it is where no bar is shown."""
        epoch = self.step // self.work.steps_an_epoch
        scores = self.work.scores(*self.work.logits(self.model, "held_out"))
        main = scores[self.work.main].tolist()
        judged = self.stage.judge(main, self.config.settings)
        if self.config.patience is not None and judged > self.best_score:
            self.best_score, self.best_epoch = judged, epoch
            self.best = copy.deepcopy(self.model.state_dict())
        self._write(
            {
                "kind": "epoch",
                "step": self.steps_before + self.step,
                "epoch": epoch,
                "stage": len(self.stages_done) + 1,
                **{f"held_out_{name}": values for name, values in scores.items()},
            }
        )
        self._checkpoint()
        if bar.disable and self.writes:
            left = self.seconds / (self.steps_before + self.step) * (self.steps - self.step)
            tqdm.write(
                f"{self._name()}: epoch {epoch}/{self.steps // self.work.steps_an_epoch}, held-out {self.work.main}"
                f" {statistics.fmean(main):.3f} over exits, {main[-1]:.3f} at the last, {left:.0f} s left",
                file=sys.stderr,
            )

    def _write(self, record: dict[str, Any]) -> None:
        if not self.writes:
            return
        self.metrics.write((json.dumps(plain(record)) + "\n").encode())
        if self.watch is not None:
            self.watch(record, self.optimizer.report if record["kind"] == "step" else None)

    def _checkpoint(self) -> None:
        if not self.writes:
            return
        self.metrics.flush()
        self.run.save_checkpoint(
            {
                "model": self.model.state_dict(),
                "teacher": None if self.teacher is None else self.teacher.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "stages_done": self.stages_done,
                "memory": self.memory,
                "best": self.best,
                "best_score": self.best_score,
                "best_epoch": self.best_epoch,
                "seconds": self.seconds,
                "metrics_size": self.metrics.tell(),
            }
        )

    def finish(self) -> None:
        """Keep the network and write what it is worth, in the first of several processes."""
        processes.on_first(self._write_results, self.work.device)

    def _write_results(self) -> None:
        self.metrics.flush()
        model = self.method.finish(self.model, self.work)
        self.work.save(model, self.run.folder)
        logits: dict[str, tuple[Tensor, Tensor]] = {split: self.work.logits(model, split) for split in _SPLITS}
        self.run.save_logits(logits)
        scores = {
            f"{split}_{name}": values for split in _SPLITS for name, values in self.work.scores(*logits[split]).items()
        }
        stages = [*self.stages_done, self.step]
        whole_depth, whole_cost = self.work.whole()
        self.run.save_result(
            {
                "main": self.work.main,
                "steps": sum(stages),
                "stages": stages,
                "seconds": self.seconds,
                "costs": asdict(self.work.costs(model)),
                "depth": self.work.depth(model),
                "whole_depth": whole_depth,
                "whole_cost": whole_cost,
                **scores,
            }
        )
