"""Helpers for weights that may be sharded over processes with FSDP2."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Partial, distribute_tensor


def shard_stage(
    stage: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    block_dtype: torch.dtype | None = None,
) -> None:
    """Shard a stage's weights over a mesh, in place: one unit per block, and one for the rest.

    The weights of a block are gathered during its forward and backward pass; those of the rest from
    the start of ``training_step`` to the end of the backward pass, and during ``validation_step``.
    Use ``unsharded`` anywhere else.

    Args:
        stage: the module to shard.
        blocks: the blocks in it.
        mesh: with one dimension, over whose processes the weights are sharded; with two, the first
            is that of replicas.
        block_dtype: the dtype in which the weights of blocks are gathered, and their gradients
            computed; gradients are accumulated and reduced in float32. None: that of the weights.
    """
    if isinstance(stage, FSDPModule):
        return
    # Inputs are left to autocast, which keeps those of norms and losses in float32.
    policy = MixedPrecisionPolicy(
        param_dtype=block_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(stage, mesh=mesh)
    register_fsdp_forward_method(stage, "training_step")
    register_fsdp_forward_method(stage, "validation_step")
    # The first unit that runs becomes the root of those inside it, so a block must not be first.
    stage.find_root = lambda: None  # type: ignore[assignment]
    register_fsdp_forward_method(stage, "find_root")


def reshard(module: nn.Module) -> None:
    """Free the gathered weights of all units, such as after a forward pass without backward."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gather all weights on every process within the block; every process must enter it.

    Changes to the gathered weights are lost.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if parts:
        module.find_root()  # type: ignore[operator]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()


@torch.no_grad()
def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's shards of tensors that may be sharded, in the same memory.

    An operation on the shards of many small tensors is several times faster than on the tensors.
    """
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all elements of tensors that may be sharded, all in the same way.

    Every process must call it.
    """
    norm = nn.utils.get_total_norm(local_shards(tensors))
    if not tensors or not isinstance(first := tensors[0], DTensor):
        return norm
    placements = [Partial() if p.is_shard() else p for p in first.placements]
    return DTensor.from_local(norm.square(), first.device_mesh, placements).full_tensor().sqrt()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; every process must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Collectives need the tensor on the mesh's device.
    on_mesh = cast(DTensor, tensor.to(tensor.device_mesh.device_type))
    return on_mesh.full_tensor().to(tensor.device)


def shard_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Shard a full tensor, which must be equal on every process, like ``reference``."""
    if isinstance(tensor, DTensor) or not isinstance(reference, DTensor):
        return tensor
    mesh = reference.device_mesh
    # src_data_rank=None: each process slices its own copy, without communication.
    shards = distribute_tensor(
        tensor.to(mesh.device_type), mesh, reference.placements, src_data_rank=None
    )
    return shards.to(reference.device)


@torch.no_grad()
def index_copy(tensor: Tensor, rows: Tensor, values: Tensor) -> None:
    """``tensor[rows] = values`` for a tensor that may be sharded.

    ``rows`` and ``values`` must be equal on every process.
    """
    full = full_tensor(tensor).clone()
    full[rows] = values.to(full)
    tensor.copy_(shard_like(full, tensor))
