"""Early exiting: what a policy is, how rows leave, and a running model that stops computing them.

Shapes: M exits, N rows, C classes; stacked logits are (M, N, C), and one exit's logits of the n rows still
there are (n, C). Exits are counted from 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradalign.multiexit.objectives import check_logits

Inputs = Tensor | Mapping[str, Tensor]
"""What a network takes: one tensor of images, say, or the tensors of a tokenizer by name."""


class MultiExitModel(Protocol):
    """A network that can be run from exit to exit, as ``MultiExitResNet``.

    Attributes:
        num_exits: M.
    """

    num_exits: int

    def start(self, inputs: Any, /) -> Any:  # noqa: ANN401 (each network has inputs and a hidden state of its own)
        """Return the hidden state before the first layer: a tensor or several by name, first dimension the N rows."""

    def advance(self, hidden: Any, /, exit: int) -> tuple[Any, Tensor]:  # noqa: ANN401
        """Run the layers from the exit before to this one, and its head: hidden state and logits (n, C)."""


@dataclass(frozen=True, eq=False)
class Decision:
    """Where the rows left and what they were answered.

    Attributes:
        labels: (N,), int64, the class with the largest logit; for regression (C = 1) the predicted value.
        exits: (N,), int64, in 1..M: how far the row was computed.
        logits: (N, C), the answer: that exit's or, for ``MaxProbability``, the most confident one's up to it.
    """

    labels: Tensor
    exits: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Policy(ABC):
    """Decide exit by exit which rows leave; whoever is left leaves at exit M.

    A subclass is a frozen dataclass and writes ``step``; ``check`` where not every M or C makes sense;
    ``settings`` for ``calibrate``; ``looks`` where it does not need every exit. The same ``step`` decides on
    stored logits (``decide``) and on a running model (``early_exit``).
    """

    @abstractmethod
    def step(self, logits: Tensor, exit: int, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Decide for the rows still there.

        Args:
            logits: (n, C), floating, of this exit.
            exit: 1 for the first.
            state: What the policy remembers of each row, tensors (n, ...), to be updated in place; empty at
                the first exit it looks at, and afterwards cut down to the rows that stayed.

        Returns:
            Which rows leave here, (n,), bool, and the answer if they do, (n, C).
        """

    def looks(self, exit: int) -> bool:
        """Say whether the policy needs the logits of an exit; where not, no row leaves and ``step`` is not called.

        Exit M is looked at always, if rows are left.
        """
        return True

    def check(self, num_exits: int, num_classes: int) -> None:  # noqa: B027 (most policies suit any network)
        """Raise ValueError unless the policy makes sense for M exits and C classes."""

    def settings(self, logits: Tensor) -> tuple[str, Sequence[Any]]:
        """Return the field to calibrate and its values worth trying on (M, N, C) logits, slowest first."""
        raise NotImplementedError(f"`settings` must be written to calibrate {type(self).__name__}.")

    def __call__(self, logits: Tensor) -> Tensor:
        """Return where each row leaves, (N,), int64, in 1..M, for stacked logits (M, N, C)."""
        return self.decide(logits).exits

    @torch.no_grad()
    def decide(self, logits: Tensor) -> Decision:
        """Return where each row leaves and what it is answered.

        Args:
            logits: (M, N, C), floating, of every exit; N may be 0.

        Raises:
            TypeError: ``logits`` is no floating tensor.
            ValueError: ``logits`` is not (M, N, C), or the policy makes no sense for this M or C.
        """
        M, N, _ = check_logits(logits)
        walk = Walk(self, M, N, logits.device)
        for exit_logits in logits:
            if not walk.looks():
                walk.pass_by()
                continue
            walk.visit(exit_logits[walk.rows])
            if walk.finished:
                break
        return walk.decision()


class Walk:
    """N rows on their way through M exits.

    Each exit that is visited writes its answer and its number for every row still there, so that the last one written
    stands.

    Args:
        policy: Says who leaves.
        num_exits: M.
        num_rows: N, which may be 0.
        device: Where the logits are.

    Attributes:
        rows: (n,), int64, ascending: the original numbers of the rows still there.
    """

    def __init__(self, policy: Policy, num_exits: int, num_rows: int, device: torch.device) -> None:
        self.rows = torch.arange(num_rows, device=device)
        self._policy = policy
        self._num_exits = num_exits
        self._exit = 0
        self._exits = torch.zeros_like(self.rows)
        self._logits: Tensor | None = None
        self._state: dict[str, Tensor] = {}

    @property
    def finished(self) -> bool:
        """No row is left, and the number of classes is known."""
        return self.rows.numel() == 0 and self._logits is not None

    def looks(self) -> bool:
        """Say whether the next exit's logits are needed."""
        exit = self._exit + 1
        return exit == self._num_exits or self._policy.looks(exit)

    def pass_by(self) -> None:
        """Go by the next exit, where no row leaves."""
        self._exit += 1

    def visit(self, logits: Tensor) -> Tensor:
        """Take the next exit's logits of the rows still there, and let some leave.

        Args:
            logits: (n, C), floating, in the order of ``rows``.

        Returns:
            The positions in ``logits`` of the rows that stay, int64, ascending.

        Raises:
            ValueError: ``logits`` is not (n, C), or the policy makes no sense for this M or C.
        """
        if logits.shape[:-1] != self.rows.shape:
            raise ValueError(
                f"`logits` must be ({self.rows.numel()}, C), one row for each still there, got shape"
                f" {tuple(logits.shape)}; `advance` must keep the rows and their order."
            )
        if self._logits is None:
            self._policy.check(self._num_exits, logits.shape[-1])
            self._logits = torch.empty_like(logits)
        self._exit += 1
        leaves, answers = self._policy.step(logits, self._exit, self._state)
        self._logits[self.rows] = answers.to(self._logits.dtype)
        self._exits[self.rows] = self._exit
        stay = (~leaves).nonzero().squeeze(-1)[: None if self._exit < self._num_exits else 0]
        self.rows = _keep(self.rows, stay)
        self._state = {name: _keep(tensor, stay) for name, tensor in self._state.items()}
        return stay

    def decision(self) -> Decision:
        """Return what has been decided; every row was visited once at least."""
        if self._logits is None:
            raise RuntimeError("`visit` must be called once at least before there is a decision.")
        labels = self._logits.squeeze(-1) if self._logits.shape[-1] == 1 else self._logits.argmax(-1)
        return Decision(labels, self._exits, self._logits)


def early_exit(model: MultiExitModel, inputs: Inputs, policy: Policy) -> Decision:
    """Run the model on a batch, and each row no further than to the exit where it leaves.

    What it does:

    1. put the model in evaluation mode, without gradients;
    2. run all rows to the first exit that the policy looks at, and ask it; the heads that are passed by are not run
       where the model has ``layers``, which runs what lies before an exit without its head;
    3. drop the rows that leave, so that only the others are computed on, and go on to the next exit;
    4. at exit M let all leave; put every module back into the mode it was in, also after an error.

    Exits and answers are those of ``policy.decide(model(inputs))`` and do not depend on the rows beside them,
    up to rounding of the model's own arithmetic.

    Args:
        model: With ``num_exits``, ``start`` and ``advance``; a method ``layers(hidden, exit) -> hidden`` saves heads.
        inputs: What ``model.start`` takes: (N, ...), or several such by name, as a tokenizer gives them; N may be 0.
        policy: Who leaves where.

    Raises:
        TypeError: ``policy`` is no ``Policy``.
        ValueError: The policy makes no sense for this M or C, or the model returns another number of rows.

    Note:
        Finding out who stays waits for the device once an exit.

    >>> from gradalign.multiexit.policies import Budget
    >>> from gradalign.multiexit.resnet import MultiExitResNet
    >>> early_exit(MultiExitResNet(depth=8), torch.zeros(4, 3, 8, 8), Budget(2)).exits
    tensor([2, 2, 2, 2])
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"`policy` must be a policy, got {policy!r}; write Entropy(0.3), say.")
    with torch.no_grad(), evaluating(model):
        hidden = model.start(inputs)
        first = hidden if isinstance(hidden, Tensor) else next(iter(hidden.values()))
        walk = Walk(policy, model.num_exits, first.shape[0], first.device)
        for exit in range(1, model.num_exits + 1):
            if not walk.looks():
                hidden = _layers(model, hidden, exit)
                walk.pass_by()
                continue
            hidden, logits = model.advance(hidden, exit)
            stay = walk.visit(logits)
            if walk.finished:
                break
            if isinstance(hidden, Tensor):
                hidden = _keep(hidden, stay)
            else:
                hidden = {name: _keep(tensor, stay) for name, tensor in hidden.items()}
    return walk.decision()


def every_exit(model: MultiExitModel, inputs: Inputs) -> Tensor:
    """Return the logits of every exit, (M, N, C), exit 1 first: what such a model's ``forward`` does.

    Args:
        model: With ``num_exits``, ``start`` and ``advance``; in the mode it is in.
        inputs: What ``model.start`` takes.
    """
    hidden = model.start(inputs)
    logits = []
    for exit in range(1, model.num_exits + 1):
        hidden, exit_logits = model.advance(hidden, exit)
        logits.append(exit_logits)
    return torch.stack(logits)


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Hold every module of ``model`` in evaluation mode, then return each to the mode it was in."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _layers(model: MultiExitModel, hidden: Any, exit: int) -> Any:  # noqa: ANN401
    """Run what lies before an exit, without its head where the model can do that."""
    layers = getattr(model, "layers", None)
    # A network may well keep its modules in a list of this name.
    if callable(layers) and not isinstance(layers, nn.Module):
        return layers(hidden, exit)
    return model.advance(hidden, exit)[0]


def _keep(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return the named rows of ``tensor``, itself where all are: ``rows`` is ascending, without repeats."""
    return tensor if rows.numel() == tensor.shape[0] else tensor[rows]
