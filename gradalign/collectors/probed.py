"""The probed collector: the anchor alone is differentiated; the others are seen through how they change along it.

Shapes: K groups, T parameters; the anchor is group 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from gradalign.collectors.agreement import agreed, telling
from gradalign.collectors.base import Collector, Loss
from gradalign.collectors.directional import DirectionalDerivatives
from gradalign.collectors.losses import Losses, Terms, check_losses
from gradalign.collectors.parameters import Layout
from gradalign.collectors.stacked import StackedCollector
from gradalign.distributed import Ranks

Probe = Callable[[], Losses]
"""Evaluates the auxiliaries' losses: a group's name to a scalar loss, or to a sequence of them."""


class ProbedCollector(Collector):
    """See every auxiliary through G_ka alone, the derivative of its loss along the anchor's gradient.

    Nothing but the anchor needs a graph and a backward. G_ka is as exact as the probe's losses stand for the batch:
    a probe of a part of it sees that part.

    Args:
        layout: The parameters, all in one block.
        ranks: Averaged over: the anchor's gradient, and the derivatives along its average.
    """

    name: ClassVar[str] = "probed"

    def __init__(self, layout: Layout, ranks: Ranks | None = None) -> None:
        super().__init__(layout, 1)
        self._ranks = ranks
        self._anchor = StackedCollector(layout, 1, must_reach=ranks is None)
        self._derivatives = DirectionalDerivatives()
        self._probes: list[Probe] = []
        self._row: dict[str, Tensor] = {}

    def add_probe(self, groups: Mapping[str, Terms], probe: Probe) -> None:
        """Take the probe of the next micro-batch.

        Raises:
            ValueError: Other losses than the anchor's are to be differentiated.
        """
        if len(groups) != 1:
            raise ValueError(
                f"`losses` must hold the anchor's loss alone beside a `probe`, got the groups {list(groups)}; let the"
                " probe return the others."
            )
        self._probes.append(probe)

    def _collect(self, losses: Sequence[Loss]) -> None:
        with telling(None if self._ranks is None or not self.last else partial(self._ranks.agree, self.layout, None)):
            self._anchor.collect(losses)  # scaled already, and scaled back before the probe moves along it

    def check_targets(self) -> None:
        """Raise ValueError where ``p.grad`` cannot be added to; over ranks that is done before any has sent a thing."""
        if self._ranks is None:
            super().check_targets()

    def counts(self) -> list[int]:
        """Return for each parameter how many groups reach it."""
        return self._anchor.counts()

    @torch.no_grad()
    def evaluate(self, anchor: str) -> tuple[str, ...]:
        """Evaluate the probes, along the anchor's gradient over all micro-batches; return the auxiliaries' names.

        Args:
            anchor: The anchor's name.

        Raises:
            TypeError: A probe returns no mapping of names to tensors.
            ValueError: A loss is not scalar, or the probes name different groups.
        """
        if self._ranks is not None:
            self._average(self._ranks, anchor)
        gradient = self._anchor.row(0)
        reached = [i for i, part in enumerate(gradient) if part is not None]
        parameters = [self.layout.parameters[i] for i in reached]
        if self.scale is not None:
            torch._foreach_div_([gradient[i] for i in reached], self.scale.to(parameters[0].device))
        with telling(None if self._ranks is None else partial(self._ranks.give_up, self.layout.device)):
            self._row = self._derivatives(self._losses, parameters, [gradient[i] for i in reached])
            if anchor in self._row:
                raise ValueError(
                    f"`probe()` must not name the anchor, {anchor!r}, which `losses` holds, got {list(self._row)}; let"
                    " it return the auxiliaries alone."
                )
        self.derivative = self._derivatives.way
        self.num_groups = 1 + len(self._row)
        if self._ranks is not None:
            self._ranks.check_same(tuple(self._row), "probed", self.layout.checksum, self.layout.device)
        return tuple(self._row)

    def _average(self, ranks: Ranks, anchor: str) -> None:
        """Average the anchor's gradient over the ranks."""
        row = self._anchor.row(0)
        reached = agreed(ranks, self.layout, anchor, row)
        ranks.average(self.layout, row, [i for i, any_rank in enumerate(reached) if any_rank]).wait()
        self._anchor.adopt([row])

    def _losses(self) -> dict[str, Terms]:
        """Return the losses of all probes, added up over the micro-batches."""
        first, *others = [check_losses(probe(), source="probe") for probe in self._probes]
        for other in others:
            if other.keys() != first.keys():
                raise ValueError(
                    f"`probe` must return the same loss groups for every micro-batch, got {list(first)} and"
                    f" {list(other)}."
                )
        return {name: sum((other[name] for other in others), terms) for name, terms in first.items()}

    def gramians(self) -> tuple[Tensor, Tensor]:
        """Return the Gramian, (1, K, K), zero but for the anchor's row and column, and zeros (K, K)."""
        return self._gramians()  # the gradient's scale is gone

    @torch.no_grad()
    def _gramians(self) -> tuple[Tensor, Tensor]:
        squared, _ = self._anchor.gramians()
        K = self.num_groups
        G = squared.new_zeros(1, K, K)
        G[:, 0, 0] = squared[:, 0, 0]
        for k, product in enumerate(self._row.values(), 1):
            G[:, 0, k] = product
            G[:, k, 0] = product
        if self._ranks is not None:
            G = self._ranks.mean(G)
        return G, torch.zeros_like(G[0])

    def seen(self, gramians: Tensor) -> Tensor:
        """Return the Gramian with NaN for the products of auxiliaries, with themselves too."""
        G = gramians.clone()
        G[..., 1:, 1:] = torch.nan
        return G

    def squares(self, gramians: Tensor, outside: Tensor) -> Tensor:
        """Return numbers that are finite where a group's gradient is, as far as is seen, (1, K)."""
        column = gramians[..., 0]  # along a gradient that is not finite no derivative is
        return torch.where(
            column[..., :1].isfinite(), column, torch.cat([column[..., :1], 0 * column[..., 1:].nan_to_num()], -1)
        )

    def write(self, weights: Tensor, support: Sequence[int], plain: Sequence[float]) -> None:
        """Add the anchor's gradient times its weight to ``p.grad``."""
        of_anchor = weights[:, :1]
        self._anchor.write(of_anchor if self.scale is None else of_anchor * self.scale, (0,), plain[:1])
        self.discard()

    def discard(self) -> None:
        """Drop the gradient and the probes."""
        super().discard()
        self._anchor.discard()
        self._probes, self._row = [], {}
