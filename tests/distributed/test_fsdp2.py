"""Operations on sharded weights in one process: values, and what they avoid."""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.stages.conftest import CAPTIONS, STAGES
from wuerstchen_pl.batch import Batch
from wuerstchen_pl.callbacks.evaluation import EvaluationCallback
from wuerstchen_pl.distributed.fsdp2 import full_tensor, local_shards, total_norm, unsharded
from wuerstchen_pl.distributed.strategy import FSDP2Strategy
from wuerstchen_pl.models.wrapping import find_blocks
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.stage import Stage


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


class Operations(TorchDispatchMode):
    """Records the name of each operation, and the tensors among its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.calls.append((str(func), tensors))
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
    with Operations() as operations:
        emas[1].update(sharded)
    assert not [n for n, args in operations.calls if any(isinstance(t, DTensor) for t in args)]
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


def smooth_batch() -> Batch:
    rng = torch.Generator().manual_seed(0)
    images = nn.functional.interpolate(torch.rand(4, 3, 4, 4, generator=rng), size=32)
    return {"image": images, "caption": list(CAPTIONS), "key": list("abcd")}


def sharded_stage(
    name: str, mesh: DeviceMesh | None, precision: str, callbacks: Sequence[Any] = ()
) -> Stage:
    """A stage before its first training step, sharded if there is a mesh."""
    stage = STAGES[name]().train()
    stage._trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=1, log_every_n_steps=10, global_step=0, global_rank=0,
        precision=precision, callbacks=list(callbacks),
    )  # fmt: skip
    stage._device_mesh = mesh
    stage.configure_model()
    return stage


def gradients(name: str, *, mesh: DeviceMesh | None, precision: str) -> Tensor:
    """All gradients of the first training step of a stage, in one vector."""
    stage = sharded_stage(name, mesh, precision)
    for block in find_blocks(stage):
        for p in local_shards(block.parameters()):
            if not p.any():  # gates that start at zero would leave most gradients at zero
                nn.init.normal_(p, std=0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        loss = stage.training_step(smooth_batch(), 0)
    loss.backward()
    grads = [p.grad for p in stage.parameters() if p.grad is not None]
    return torch.cat([full_tensor(grad).flatten() for grad in grads])


def test_an_evaluation_during_training_has_float32_weights(mesh_of_one: DeviceMesh) -> None:
    """It computes outside of autocast, in which weights in bfloat16 would be an error."""
    for callbacks, dtype in (([], torch.bfloat16), ([EvaluationCallback], torch.float32)):
        stage = sharded_stage("c", mesh_of_one, "bf16-mixed", callbacks)
        with unsharded(stage):
            dtypes = {p.dtype for block in find_blocks(stage) for p in block.parameters()}
        assert dtypes == {dtype}


@pytest.mark.parametrize("name", STAGES)
def test_gradients_with_gathering_in_bfloat16_are_as_exact_as_with_autocast(
    name: str, mesh_of_one: DeviceMesh
) -> None:
    float32 = gradients(name, mesh=None, precision="32-true")
    autocast = gradients(name, mesh=None, precision="bf16-mixed")
    sharded = gradients(name, mesh=mesh_of_one, precision="bf16-mixed")
    error = (autocast - float32).norm()
    assert 0 < error < 0.05 * float32.norm()
    assert (sharded - float32).norm() < 1.2 * error


@pytest.mark.parametrize("nodes", [1, 2])
def test_micro_batches_gather_blocks_in_bfloat16_and_reduce_once(
    nodes: int, fake_processes: int
) -> None:
    """Two micro-batches gather blocks twice each, forward and backward, and reduce them once."""
    shape, names = (nodes, fake_processes // nodes), ("replicate", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    stage = sharded_stage("c", mesh if nodes > 1 else mesh["shard"], "bf16-mixed")
    blocks = len(find_blocks(stage))
    strategy = FSDP2Strategy()
    strategy._model = stage
    with Operations() as operations:
        for micro_batch in strategy.block_backward_sync, nullcontext:
            with micro_batch(), torch.autocast("cpu", torch.bfloat16):
                stage.training_step(smooth_batch(), 0).backward()
    expected = {
        ("_allgather_base_", torch.bfloat16): 2 * 2 * blocks,
        ("_allgather_base_", torch.float32): 2,
        ("_reduce_scatter_base_", torch.float32): blocks + 1,
    }
    if nodes > 1:  # of the scattered gradients, over nodes
        expected["allreduce_", torch.float32] = blocks + 1
    calls = Counter(
        (name.split(".")[1], args[0].dtype) for name, args in operations.calls if "c10d" in name
    )
    assert calls == expected
