"""Weights that are sharded over processes (FSDP2), and how to use them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_stage(stage: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard a stage's weights over a mesh, in place: each block a unit, the rest another.

    A unit is gathered while its forward or backward pass runs; the unit of the rest, from the start
    of ``training_step`` to the end of the backward pass, and during ``validation_step``. Anywhere
    else, use ``unsharded``.
    """
    if isinstance(stage, FSDPModule):
        return
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(stage, mesh=mesh)
    register_fsdp_forward_method(stage, "training_step")
    register_fsdp_forward_method(stage, "validation_step")


def reshard(module: nn.Module) -> None:
    """Free the gathered weights of all units, such as those left by a pass without backward."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gather all weights on every process within the block; all processes have to enter it.

    Changes to the weights within the block are lost.
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
    """The whole of a tensor that may be sharded; all processes have to call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Collectives need it on the mesh's device.
    on_mesh = cast(DTensor, tensor.to(tensor.device_mesh.device_type))
    return on_mesh.full_tensor().to(tensor.device)


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, equal on every process, sharded like ``other``."""
    if isinstance(tensor, DTensor) or not isinstance(other, DTensor):
        return tensor
    mesh = other.device_mesh
    # Each process takes its shard of its own copy: no communication.
    shards = distribute_tensor(
        tensor.to(mesh.device_type), mesh, other.placements, src_data_rank=None
    )
    return shards.to(other.device)


@torch.no_grad()
def index_copy(tensor: Tensor, rows: Tensor, values: Tensor) -> None:
    """``tensor[rows] = values`` for a tensor that may be sharded; arguments equal everywhere."""
    full = full_tensor(tensor).clone()
    full[rows] = values.to(full)
    tensor.copy_(shard_like(full, tensor))
