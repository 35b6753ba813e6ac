"""The activations that training keeps for its backward pass: fewer of them, and their bytes."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from wuerstchen_pl.models.wrapping import find_blocks

ATEN = torch.ops.aten
ATTENTION = {
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
}
PRODUCTS = {ATEN.mm.default, ATEN.addmm.default}


def checkpoint_activations(module: nn.Module) -> None:
    """Make each block recompute most of its activations in the backward pass.

    A block keeps its inputs, and what is small but takes long to compute: the outputs of attention
    without dropout, and of matrix products to half as many channels or fewer. The gradients do not
    change, dropout included (Chen et al. 2016, arXiv 1604.06174; Korthikanti et al. 2022, arXiv
    2205.05198).
    """
    for block in find_blocks(module):
        block.forward = _checkpointed(block, block.forward)


def _checkpointed(block: nn.Module, forward: Callable) -> Callable:
    def checkpointed(*args: Any) -> Any:  # not functools.partial, which torch.compile skips
        if not _needs_gradients(block, args):
            return forward(*args)
        # Autocast would cast a weight that another forward pass has cast once less than the
        # recomputation does, and kept outputs are found by the number of operations before.
        kind = args[0].device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):
            return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts)

    return checkpointed


def _needs_gradients(block: nn.Module, args: tuple) -> bool:
    inputs = (each for each in tree_leaves(args) if isinstance(each, Tensor))
    tensors = (*block.parameters(), *inputs)
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a block's forward pass and of its recomputation."""
    keep, reuse = create_selective_checkpoint_contexts(_policy)
    counter = _COUNTER.get()
    return (keep if counter is None else _counted(keep, counter)), reuse


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = _is_kept(op, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _is_kept(op: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    if op in PRODUCTS:
        channels, out_channels = args[-1].shape
        return 2 * out_channels <= channels
    # with dropout, the recomputation must draw its random numbers, or later ones would differ
    return op in ATTENTION and _argument(op, "dropout_p", args, kwargs) == 0


def _argument(op: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The value of an operation's argument, or its default."""
    declared = op._schema.arguments
    index = next(i for i, argument in enumerate(declared) if argument.name == name)
    if index < len(args):
        return args[index]
    return kwargs.get(name, declared[index].default_value)


class SavedActivations:
    """What forward passes keep for their backward passes, each storage once.

    Includes the outputs that a checkpointed block keeps, which PyTorch's hooks for saved tensors
    need not see.
    """

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Context whose forward passes are added."""
        token = _COUNTER.set(self)
        try:
            with warnings.catch_warnings(), saved_tensors_hooks(self.add, lambda tensor: tensor):
                # PyTorch says that the hooks do not see these outputs yet
                warnings.filterwarnings("ignore", "A saved_tensors_hooks context", FutureWarning)
                yield
        finally:
            _COUNTER.reset(token)

    def add(self, tensor: Tensor) -> Tensor:
        """Add the storage of a tensor; returns the tensor."""
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage  # kept, so that no other gets its address
        return tensor

    def nbytes(self, weights: Iterable[Tensor]) -> int:
        """Bytes now, not counting these weights or their local shards."""
        excluded = {_storage(weight)._cdata for weight in weights}
        return sum(s.nbytes() for address, s in self._storages.items() if address not in excluded)


_COUNTER: ContextVar[SavedActivations | None] = ContextVar("counter", default=None)


@contextmanager
def _counted(keep: AbstractContextManager, counter: SavedActivations) -> Iterator[None]:
    with keep, _KeptOutputs(counter):
        yield


class _KeptOutputs(TorchDispatchMode):
    """Adds the outputs that a checkpointed block keeps to a counter."""

    def __init__(self, counter: SavedActivations) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        if _is_kept(func, args, kwargs or {}):
            for each in tree_leaves(out):
                if isinstance(each, Tensor):
                    self.counter.add(each)
        return out


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return getattr(tensor, "to_local", lambda: tensor)().untyped_storage()
