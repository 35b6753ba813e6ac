"""Fully sharded data parallel training (FSDP2), with checkpoints in parts or in one file."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from wuerstchen_pl.checkpointing import sharded
from wuerstchen_pl.checkpointing.async_save import save_or_defer
from wuerstchen_pl.distributed.fsdp2 import full_tensor, shard_like


class FSDP2Strategy(ModelParallelStrategy):
    """Each process holds its part of weights, gradients, EMA and optimizer state.

    Lightning's own strategy writes EMA weights and the rest of a checkpoint from one process only,
    and into a pickle. Whatever one wrote, the other reads, with any number of processes.

    Args:
        sharded_checkpoint: write checkpoints as folders to which each process adds what it holds;
            False gathers them into one file.
    """

    def __init__(self, *, sharded_checkpoint: bool = True) -> None:
        super().__init__(save_distributed_checkpoint=sharded_checkpoint)

    def setup_environment(self) -> None:
        """Spread over all processes of all machines."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's tensors, sharded."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's tensors, sharded, by the number of their parameter."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return optimizer.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a folder, or gather a file; or leave the writing to a ``DeferredSave``.

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
        """Read either form into the module and its optimizers; returns all that was there."""
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        known = _ParameterIndex(self.lightning_module, self.optimizers)
        if sharded.is_sharded(path):
            checkpoint = sharded.read_sharded(path, known.template)
        else:
            checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
            checkpoint = known.sharded(checkpoint)
        self.lightning_module.load_state_dict(checkpoint["state_dict"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
        return checkpoint


class _ParameterIndex:
    """Which parameter a tensor of a checkpoint belongs to, and so how it is sharded."""

    def __init__(self, module: nn.Module, optimizers: list[Optimizer]) -> None:
        self.by_name = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.by_number = [
            [p for group in optimizer.param_groups for p in group["params"]]
            for optimizer in optimizers
        ]

    def owner(self, path: tuple[str | int, ...]) -> Tensor | None:
        """The parameter or buffer of ``state_dict``, ``ema|shadow`` or ``optimizer_states``."""
        match path:
            case ("state_dict", str(name)) | ("ema", "shadow", str(name)):
                return self.by_name.get(name)
            case ("optimizer_states", int(optimizer), "state", int(number), _):
                return self.by_number[optimizer][number]
        return None

    def template(self, path: tuple[str | int, ...], size: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor to read one of a checkpoint into."""
        owner = self.owner(path)
        if isinstance(owner, DTensor) and owner.shape == size:
            return torch.empty_like(owner.detach(), dtype=dtype)
        return torch.empty(size, dtype=dtype)

    def sharded(self, node: Any, path: tuple[str | int, ...] = ()) -> Any:
        """A copy of a checkpoint in which whole tensors are sharded as those they belong to."""
        if isinstance(node, dict):
            return {k: self.sharded(v, (*path, k)) for k, v in node.items()}
        if isinstance(node, list):
            return [self.sharded(v, (*path, i)) for i, v in enumerate(node)]
        owner = self.owner(path) if isinstance(node, Tensor) else None
        return shard_like(node, owner) if owner is not None and owner.shape == node.shape else node


def _gather_tree(node: Any, *, keep: bool) -> Any:
    """A copy of a tree with whole tensors, in the host's memory; none where they are not kept."""
    if isinstance(node, dict):
        return {k: _gather_tree(v, keep=keep) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_gather_tree(v, keep=keep) for v in node)
    if isinstance(node, Tensor):
        full = full_tensor(node)
        return full.cpu() if keep else None
    return node
