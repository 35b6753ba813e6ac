"""Weights that lie in parts on several processes (FSDP2), and how to reach them whole."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_stage(stage: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Spread a stage's weights over a mesh, in place: each block a unit, and what is left another.

    A unit is whole on each process only while its forward or backward pass runs; the unit of what
    is left, from the beginning of ``training_step`` to the end of the backward pass. Outside of
    these, use ``gathered``.
    """
    if isinstance(stage, FSDPModule):
        return
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(stage, mesh=mesh)
    register_fsdp_forward_method(stage, "training_step")


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Let every process have the whole weights within the block; all of them have to enter it.

    What is changed in the weights within the block is lost.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, as one; all processes have to call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    # where the processes can talk, wherever it lies
    placed = cast(DTensor, tensor.to(tensor.device_mesh.device_type))
    return placed.full_tensor().to(tensor.device)


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same on every process, sharded as ``other`` is."""
    if isinstance(tensor, DTensor) or not isinstance(other, DTensor):
        return tensor
    mesh = other.device_mesh
    # each takes its part of what it has, without a word to the others
    parts = distribute_tensor(
        tensor.to(mesh.device_type), mesh, other.placements, src_data_rank=None
    )
    return parts.to(other.device)


@torch.no_grad()
def index_copy(tensor: Tensor, rows: Tensor, values: Tensor) -> None:
    """``tensor[rows] = values`` of a tensor that may be sharded; the same on every process."""
    full = full_tensor(tensor).clone()
    full[rows] = values.to(full)
    tensor.copy_(shard_like(full, tensor))
