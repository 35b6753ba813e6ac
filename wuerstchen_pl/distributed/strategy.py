"""Fully sharded data-parallel training (FSDP2), with sharded or single-file checkpoints."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from wuerstchen_pl.checkpointing import load, sharded
from wuerstchen_pl.checkpointing.async_save import save_or_defer
from wuerstchen_pl.distributed.fsdp2 import full_tensor, shard_like


class FSDP2Strategy(ModelParallelStrategy):
    """Each process has a shard of weights, gradients, EMA weights and optimizer state.

    Unlike with Lightning's ``ModelParallelStrategy``, EMA weights are saved sharded, and without a
    pickle. Both forms of checkpoint can be loaded with any number of processes.

    Args:
        sharded_checkpoint: write a checkpoint as a folder with the shards of each process; False
            gathers it into a single file.
        shard_within_node: shard over the processes of each node, and replicate over nodes, so that
            only gradients are sent between nodes (hybrid sharding); False shards over all
            processes, for networks that are too large for a node.
    """

    def __init__(self, *, sharded_checkpoint: bool = True, shard_within_node: bool = True) -> None:
        super().__init__(save_distributed_checkpoint=sharded_checkpoint)
        self.shard_within_node = shard_within_node

    def setup_environment(self) -> None:
        """Create the mesh over which ``Stage.configure_model`` shards."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()
        replicas = self.num_nodes if self.shard_within_node else 1
        shape, names = (replicas, self.world_size // replicas), ("replicate", "shard")
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = mesh if replicas > 1 else mesh["shard"]

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Keep the gradients of a micro-batch on each process; the last one reduces the sum."""
        module = cast(FSDPModule, self.model)
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state with sharded tensors."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state by parameter index, with sharded tensors."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return optimizer.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a sharded or gathered checkpoint, or leave the writing to a ``DeferredSave``.

        Raises:
            OSError: if the disk is full or fails.
        """
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            checkpoint = _gather_tree(checkpoint, keep=self.global_rank == 0)

        def write(content: dict[str, Any], group: ProcessGroup | None) -> None:
            if self._save_distributed_checkpoint:
                sharded.write_sharded(content, path, group)
            elif self.global_rank == 0:
                with path.open("wb") as file:
                    torch.save(content, file)

        save_or_defer(checkpoint, write, storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load either form into the module and its optimizers; returns the whole checkpoint."""
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        index = _ParameterIndex(self.lightning_module, self.optimizers)
        if sharded.is_sharded(path):
            checkpoint = sharded.read_sharded(path, index.template)
        else:
            checkpoint = index.shard(load.read_checkpoint(path))
        # Lightning's hook for checks comes only later, after the weights were loaded
        cast(_Resumable, self.lightning_module).check_checkpoint(checkpoint)
        self.lightning_module.load_state_dict(checkpoint["state_dict"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
        return checkpoint


class _Resumable(Protocol):
    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None: ...


class _ParameterIndex:
    """Maps tensors of a checkpoint to the parameters whose sharding they share."""

    def __init__(self, module: nn.Module, optimizers: list[Optimizer]) -> None:
        self.by_name = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.by_optimizer = [
            [p for group in optimizer.param_groups for p in group["params"]]
            for optimizer in optimizers
        ]

    def parameter(self, path: tuple[str | int, ...]) -> Tensor | None:
        """The parameter or buffer that a tensor at ``path`` in a checkpoint belongs to, or None."""
        match path:
            case ("state_dict", str(name)) | ("ema", "shadow", str(name)):
                return self.by_name.get(name)
            case ("optimizer_states", int(optimizer), "state", int(index), _):
                return self.by_optimizer[optimizer][index]
        return None

    def template(self, path: tuple[str | int, ...], size: torch.Size, dtype: torch.dtype) -> Tensor:
        """An empty tensor to read the tensor at ``path`` into, sharded like its parameter."""
        parameter = self.parameter(path)
        if isinstance(parameter, DTensor) and parameter.shape == size:
            return torch.empty_like(parameter.detach(), dtype=dtype)
        return torch.empty(size, dtype=dtype)

    def shard(self, node: Any, path: tuple[str | int, ...] = ()) -> Any:
        """A copy of a checkpoint with full tensors sharded like their parameters."""
        if isinstance(node, dict):
            return {k: self.shard(v, (*path, k)) for k, v in node.items()}
        if isinstance(node, list):
            return [self.shard(v, (*path, i)) for i, v in enumerate(node)]
        parameter = self.parameter(path) if isinstance(node, Tensor) else None
        if parameter is None or parameter.shape != node.shape:
            return node
        return shard_like(node, parameter)


def _gather_tree(node: Any, *, keep: bool) -> Any:
    """A copy of nested containers with full tensors in host memory; None for each if not kept."""
    if isinstance(node, dict):
        return {k: _gather_tree(v, keep=keep) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_gather_tree(v, keep=keep) for v in node)
    if isinstance(node, Tensor):
        full = full_tensor(node)
        return full.cpu() if keep else None
    return node
