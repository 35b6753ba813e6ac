"""Operations on sharded weights in one process: values, and what they avoid."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wuerstchen_pl.distributed.fsdp2 import local_shards, total_norm
from wuerstchen_pl.stages.ema import EMA


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


class ShardedOperations(TorchDispatchMode):
    """Names of the operations that have a ``DTensor`` among their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if any(isinstance(leaf, DTensor) for leaf in tree_leaves((args, kwargs))):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_ema_of_sharded_weights_takes_no_sharded_operation(mesh_of_one: DeviceMesh) -> None:
    """An operation on a ``DTensor`` takes longer than the update of all local shards."""
    plain, sharded = layers(), layers()
    fully_shard(sharded, mesh=mesh_of_one)
    emas = EMA(decay=0.9), EMA(decay=0.9)
    for ema, module in zip(emas, (plain, sharded), strict=True):
        ema.update(module)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(3)
    emas[0].update(plain)
    with ShardedOperations() as operations:
        emas[1].update(sharded)
    assert not operations.names
    for name, shadow in emas[1].shadow.items():
        assert isinstance(shadow, DTensor)
        assert torch.equal(shadow.full_tensor(), emas[0].shadow[name])


def test_the_norm_of_sharded_tensors_is_that_of_all_elements(mesh_of_one: DeviceMesh) -> None:
    sharded = layers()
    expected = torch.cat([p.detach().flatten() for p in sharded.parameters()]).norm()
    fully_shard(sharded, mesh=mesh_of_one)
    torch.testing.assert_close(total_norm(list(sharded.parameters())), expected)


def test_local_shards_share_memory_with_their_tensors(mesh_of_one: DeviceMesh) -> None:
    sharded = layers()
    fully_shard(sharded, mesh=mesh_of_one)
    with torch.no_grad():
        torch._foreach_mul_(local_shards(sharded.parameters()), 0.0)
    assert all(not p.full_tensor().any() for p in sharded.parameters() if isinstance(p, DTensor))
