"""Parameters of which each rank holds a part: DTensors, as ``fully_shard`` and tensor parallelism make them.

A mesh has N ranks in one or more dimensions; along each a parameter is either cut or held by all ranks alike.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch import distributed as dist

from gradalign.distributed import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever made one has loaded it
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, without a graph."""
    if not is_sharded(tensor):
        return tensor
    part: Any = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part.wait() if hasattr(part, "wait") else part  # type: ignore[no-any-return]


def local_gradient(parameter: Tensor) -> Tensor | None:
    """Return what this rank holds of ``p.grad``, placed as the parameter is."""
    gradient = parameter.grad
    if gradient is None or not is_sharded(parameter):
        return gradient
    placed: Any = gradient
    if placed.placements != parameter.placements:  # type: ignore[attr-defined]
        placed = placed.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local(placed)


def like(parameter: Tensor, part: Tensor) -> Tensor:
    """Return the tensor of which this rank holds the part, placed as the parameter is."""
    if not is_sharded(parameter):
        return part
    sharded: Any = parameter
    return type(sharded).from_local(  # type: ignore[no-any-return]
        part, sharded.device_mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
    )


class Shards:
    """How the parts of some parameters lie on a mesh, and sums over them.

    Args:
        parameters: The parameters. A plain one is held by all ranks alike.

    Attributes:
        ranks: The ranks of the mesh.
        copies: For each parameter, how many ranks hold each of its elements.
        plain: The numbers of those that are no DTensors: nobody has averaged their gradients.

    Raises:
        ValueError: The parameters lie on meshes of which none holds all ranks of the others.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._mesh: DeviceMesh = max((p.device_mesh for p in parameters if is_sharded(p)), key=lambda mesh: mesh.size())  # type: ignore[attr-defined]
        self.size = self._mesh.size()
        self.ranks = Ranks(self._group(), self.size)
        ranks = set(self._mesh.mesh.flatten().tolist())
        self.copies: list[int] = []
        self._missing: list[list[int]] = []  # the dimensions of the mesh that a parameter's own lacks
        self.plain: list[int] = []
        for place, parameter in enumerate(parameters):
            if not is_sharded(parameter):
                self.copies.append(len(ranks))
                self._missing.append([])
                self.plain.append(place)
                continue
            mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
            if not ranks >= set(mesh.mesh.flatten().tolist()):
                raise ValueError(
                    f"`optimizer` must hold parameters on one device mesh, or on parts of one, got some on {mesh} and"
                    f" others on {self._mesh}; give each mesh an optimizer of its own."
                )
            pieces = 1
            for dimension, placement in enumerate(placements):
                if not placement.is_replicate():
                    pieces *= mesh.size(dimension)
            self.copies.append(len(ranks) // pieces)
            self._missing.append(self._dimensions_beside(mesh))

    def _group(self) -> dist.ProcessGroup | None:
        """Return the process group of the whole mesh."""
        if self._mesh.ndim == 1:
            return self._mesh.get_group(0)
        if self.size == dist.get_world_size():
            return None
        return self._mesh._flatten().get_group()

    def _dimensions_beside(self, mesh: DeviceMesh) -> list[int]:
        if mesh.size() == self.size:
            return []
        of_whole, of_part = self._mesh.mesh_dim_names, mesh.mesh_dim_names
        if of_whole is None or of_part is None or not set(of_part) <= set(of_whole):
            raise ValueError(
                "`optimizer` must hold parameters on one device mesh, or on parts of one that are named alike, got"
                f" some on {mesh} and others on {self._mesh}; pass mesh_dim_names to init_device_mesh and take the"
                " parts from it."
            )
        return [dimension for dimension, name in enumerate(of_whole) if name not in of_part]

    def average(self, i: int, gradient: Tensor) -> Tensor:
        """Return the mean of a DTensor's gradient over the dimensions of the mesh that its own lacks."""
        for dimension in self._missing[i]:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=self._mesh.get_group(dimension))
            gradient /= self._mesh.size(dimension)
        return gradient
