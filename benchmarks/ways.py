"""The ways to take a step: the floor, joint training, gradalign's collectors, and the peers as their pages say.

A peer does what its own documentation shows, with PCGrad where it has it, so that all of them do the same work; each
is imported when its way is made, so that one that is missing or broken fails alone. Peers that average are told to sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from models import Workload
from timing import failure
from torch import Tensor

from gradalign import GradientAligner, rules

Losses = dict[str, Tensor]


class Way:
    """One way to take steps with a workload's model; called, it takes ``steps`` of them.

    Args:
        workload: The workload. All ways share its model and its inner optimizer.

    Attributes:
        zero_late: Reset the gradients after the forward, right before the backward, rather than before the forward.
    """

    steps = 1

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.parameters = workload.parameters
        self.inner = workload.inner
        self.zero_late = False

    def losses(self) -> Losses:
        """Run the forward."""
        return self.workload.losses()

    def backward(self, losses: Losses) -> None:
        """Set ``p.grad``."""
        raise NotImplementedError

    def step(self) -> None:
        """Change the parameters."""
        self.inner.step()

    def report(self) -> dict[str, object]:
        """Return what the way says of its last step, for the record."""
        return {}

    def __call__(self) -> None:
        """Take the steps."""
        for _ in range(self.steps):
            if not self.zero_late:
                self.inner.zero_grad()
            losses = self.losses()
            if self.zero_late:
                self.inner.zero_grad()
            self.backward(losses)
            self.step()


class Floor(Way):
    """One forward, K backwards, the inner step, and nothing else: what an exact step cannot do without."""

    def backward(self, losses: Losses) -> None:
        """Differentiate each loss; a parameter keeps the gradient of the last loss that reaches it."""
        for k, loss in enumerate(losses.values()):
            retain = k + 1 < len(losses)
            gradients = torch.autograd.grad(loss, self.parameters, retain_graph=retain, allow_unused=True)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient


class Batched(Way):
    """The floor with all K backwards at once, by vmap: no exact step that differentiates so can be quicker."""

    def backward(self, losses: Losses) -> None:
        """Differentiate all losses together; a parameter keeps the gradient of the last one."""
        stacked = torch.stack(list(losses.values()))
        chosen = torch.eye(len(stacked), dtype=stacked.dtype, device=stacked.device)
        gradients = torch.autograd.grad(stacked, self.parameters, chosen, is_grads_batched=True, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient[-1]


class Joint(Way):
    """Plain training on the sum of the losses."""

    def backward(self, losses: Losses) -> None:
        """Take one backward."""
        sum(losses.values()).backward()


class Aligned(Way):
    """gradalign with a rule and a collector.

    Args:
        workload: The workload.
        rule: The rule.
        collector: As the aligner takes it.
        options: More of the aligner's settings.
    """

    def __init__(self, workload: Workload, rule: rules.Rule, collector: str, **options: Any) -> None:  # noqa: ANN401
        super().__init__(workload)
        self.aligner = GradientAligner(workload.inner, rule, collector=collector, **options)
        self.steps = options.get("update_every", 1)

    def backward(self, losses: Losses) -> None:
        """Align the losses."""
        self.aligner.backward(losses)

    def step(self) -> None:
        """Step through the aligner."""
        self.aligner.step()

    def report(self) -> dict[str, object]:
        """Return which collector ran, and how the probed one differentiated."""
        names = ("collector", "derivative")
        said = {name: getattr(self.aligner.report, name, None) for name in names}
        return {name: value for name, value in said.items() if value is not None}


class Probed(Aligned):
    """gradalign's probed collector: the auxiliary is seen on a quarter of the batch, without a backward."""

    def losses(self) -> Losses:
        """Run the forward for the anchor alone."""
        return self.workload.anchor_loss()

    def backward(self, losses: Losses) -> None:
        """Align the anchor by the probe."""
        self.aligner.backward(losses, probe=self.workload.probe)


class TorchJD(Way):
    """``autojac.backward`` and ``jac_to_grad``.

    Args:
        workload: The workload.
        aggregator: The name of an aggregator.
        lean: Differentiate one loss after the other, not all in parallel by vmap, and do not join the Jacobians: the
            settings that TorchJD offers for where memory or vmap is the trouble.
    """

    def __init__(self, workload: Workload, aggregator: str, *, lean: bool = False) -> None:
        super().__init__(workload)
        self.autojac, self.lean = import_module("torchjd.autojac"), lean
        self.aggregator = getattr(import_module("torchjd.aggregation"), aggregator)()

    def backward(self, losses: Losses) -> None:
        """Fill ``p.jac`` and aggregate it."""
        self.autojac.backward(
            list(losses.values()), inputs=self.parameters, parallel_chunk_size=1 if self.lean else None
        )
        self.autojac.jac_to_grad(self.parameters, self.aggregator, optimize_gramian_computation=self.lean)


class ConflictFree(Way):
    """conflictfree's operators on gradient vectors of the whole network.

    Its page runs a forward for each loss; this takes the losses of one, as all other ways do.

    Args:
        workload: The workload.
        operator: The name of an operator.
    """

    def __init__(self, workload: Workload, operator: str) -> None:
        super().__init__(workload)
        self.utils = import_module("conflictfree.utils")
        self.operator = getattr(import_module("conflictfree.grad_operator"), operator)()

    def backward(self, losses: Losses) -> None:
        """Collect a vector for each loss, and put the aligned one back."""
        model, vectors = self.workload.model, []
        for k, loss in enumerate(losses.values()):
            self.inner.zero_grad()
            loss.backward(retain_graph=k + 1 < len(losses))
            vectors.append(self.utils.get_gradient_vector(model, none_grad_mode="zero"))
        # Vectors with zeros where there was no gradient are as long as all parameters, which this one asks for.
        self.utils.apply_gradient_vector_para_based(model, self.operator.calculate_gradient(vectors))


class PytorchOptimizer(Way):
    """pytorch_optimizer's PCGrad around the inner optimizer.

    Args:
        workload: The workload.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.wrapper = import_module("pytorch_optimizer").PCGrad(workload.inner, reduction="sum")

    def backward(self, losses: Losses) -> None:
        """Let the wrapper take the backwards."""
        self.wrapper.pc_backward(list(losses.values()))

    def step(self) -> None:
        """Step through the wrapper."""
        self.wrapper.step()


class LibMTL(Way):
    """LibMTL's weighting PCGrad, given what its Trainer and its architecture would give it.

    Args:
        workload: The workload.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        base = import_module("LibMTL.weighting").PCGrad

        class Weighting(base):  # LibMTL mixes a weighting into an architecture: here the encoder is the whole model
            def get_share_params(self) -> Iterable[torch.nn.Parameter]:
                return workload.model.parameters()

            def zero_grad_share_params(self) -> None:
                workload.model.zero_grad()

        self.weighting = Weighting()
        self.weighting.rep_grad, self.weighting.device = False, workload.inputs.device

    def backward(self, losses: Losses) -> None:
        """Let the weighting take the backwards."""
        self.weighting.task_num = len(losses)
        self.weighting.backward(list(losses.values()))


WAYS: dict[str, Callable[[Workload], Way]] = {
    "floor": Floor,
    "floor, batched": Batched,
    "joint": Joint,
    "stacked GASoft": lambda workload: Aligned(workload, rules.GASoft(0.3), "stacked"),
    "stacked GASoft, propagate": lambda workload: Aligned(
        workload, rules.GASoft(0.3), "stacked", nonfinite="propagate"
    ),
    "stacked PCGrad": lambda workload: Aligned(workload, rules.PCGrad(), "stacked"),
    "stacked UPGrad": lambda workload: Aligned(workload, rules.UPGrad(), "stacked"),
    "stacked PCGrad, every 4th": lambda workload: Aligned(workload, rules.PCGrad(), "stacked", update_every=4),
    "batched PCGrad": lambda workload: Aligned(workload, rules.PCGrad(), "batched"),
    "streamed GASoft": lambda workload: Aligned(workload, rules.GASoft(0.3), "streamed"),
    "probed GASoft": lambda workload: Probed(workload, rules.GASoft(0.3), "probed"),
    "torchjd PCGrad": lambda workload: TorchJD(workload, "PCGrad"),
    "torchjd PCGrad, lean": lambda workload: TorchJD(workload, "PCGrad", lean=True),
    "torchjd UPGrad": lambda workload: TorchJD(workload, "UPGrad"),
    "conflictfree PCGrad": lambda workload: ConflictFree(workload, "PCGradOperator"),
    "conflictfree ConFIG": lambda workload: ConflictFree(workload, "ConFIGOperator"),
    "pytorch_optimizer PCGrad": PytorchOptimizer,
    "LibMTL PCGrad": LibMTL,
}
"""A way's name to what makes it."""

REFERENCES = ("floor", "joint")
PEERS = ("torchjd", "conflictfree", "pytorch_optimizer", "LibMTL")
"""The peers' distributions, as the names of ways begin."""


def suitable(names: Iterable[str], workload: Workload) -> list[str]:
    """Return the ways that make sense for the workload.

    A probe needs an anchor and an auxiliary. Not to look whether gradients are finite saves a wait for the device, of
    which there is none on the CPU.
    """
    waits = workload.inputs.device.type != "cpu"
    return [
        name
        for name in names
        if (workload.has_probe or not name.startswith("probed")) and (waits or not name.endswith("propagate"))
    ]


def make(names: Iterable[str], workload: Workload) -> tuple[dict[str, Way], dict[str, str]]:
    """Return the ways, and why those that could not be made could not.

    Args:
        names: Keys of ``WAYS``.
        workload: The workload.
    """
    made: dict[str, Way] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            made[name] = WAYS[name](workload)
        except Exception as error:  # noqa: BLE001, a peer may fail with anything, and the table says so
            failed[name] = failure(error)
    return made, failed


def in_order(names: Iterable[str], *parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of several mappings in the order of the names."""
    joined = {name: value for part in parts for name, value in part.items()}
    return {name: joined[name] for name in names if name in joined}
