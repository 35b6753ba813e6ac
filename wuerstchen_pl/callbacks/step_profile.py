"""A forward pass of a few samples before training begins: what it computes, what it keeps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

UNBATCHED_KEYS = ("size", "empty_text", "counts")
"""Keys of a batch that hold one thing for all of its samples."""


class StepProfile(NamedTuple):
    """Of a training step on one process."""

    flops_of_sample: float  # of forward and backward; a product and a sum are two
    kept_bytes: int  # of the whole batch, by the forward pass for the backward pass, weights apart
    kept_bytes_of_sample: float


_MEASURED: WeakKeyDictionary[nn.Module, StepProfile] = WeakKeyDictionary()


def profile_step_once(module: L.LightningModule, batch: dict[str, Any]) -> StepProfile:
    """``measured`` with the first batch of a run, whoever asks."""
    if module not in _MEASURED:
        _MEASURED[module] = profile_step(module, batch)
    return _MEASURED[module]


def profile_step(module: L.LightningModule, batch: dict[str, Any]) -> StepProfile:
    """Try a training step with two and with four samples of a batch, and leave no trace of it.

    Operations whose gradients are recorded count three times, as the backward pass takes two for
    each. What does not grow with the samples, such as weights in another form, counts once. All
    processes have to call it.
    """
    rows = len(batch["caption"])
    few, more = (2, 4) if rows >= 4 else (rows, rows)
    flops, kept = _tried(module, first_rows(batch, few))
    if few == more:
        return StepProfile(flops / rows, kept, kept / rows)
    more_flops, more_kept = _tried(module, first_rows(batch, more))
    of_sample = (more_kept - kept) / (more - few)
    in_all = round(kept + of_sample * (rows - few))
    return StepProfile((more_flops - flops) / (more - few), in_all, of_sample)


def _tried(module: L.LightningModule, batch: dict[str, Any]) -> tuple[int, int]:
    """Operations and kept bytes of a training step."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    precision = module.trainer.precision_plugin.train_step_context()
    with _unnoticed(module), precision, torch.enable_grad(), hooks, _Operations() as operations:
        loss = module.training_step(_apart(batch), 0)
    for p in module.parameters():
        kept.pop(_place(p), None)
    del loss
    return operations.number, sum(kept.values())


def first_rows(batch: dict[str, Any], number: int) -> dict[str, Any]:
    """The first samples of a batch."""
    return {k: v if k in UNBATCHED_KEYS else v[:number] for k, v in batch.items()}


def _apart(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch in memory of its own."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}


class _Operations(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", None)
        if packet in flop_registry:
            times = 3 if torch.is_grad_enabled() else 1
            self.number += times * flop_registry[packet](*args, **kwargs, out_val=out)
        return out


@contextmanager
def _unnoticed(module: L.LightningModule) -> Iterator[None]:
    """Restore buffers, random numbers and losses that are summed up, and log nothing."""
    before = {name: b.detach().clone() for name, b in module.named_buffers()}
    logging = ("log", "log_dict")
    own = {name: vars(module).pop(name) for name in logging if name in vars(module)}
    for name in logging:
        setattr(module, name, lambda *args, **kwargs: None)
    try:
        with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
            yield
    finally:
        for name in logging:
            delattr(module, name)
        for name, function in own.items():
            setattr(module, name, function)
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(before[name])
        if (bands := getattr(module, "timestep_bins", None)) is not None:
            bands.pop()


def _place(tensor: Tensor) -> int:
    local = getattr(tensor, "to_local", lambda: tensor)()
    return local.untyped_storage().data_ptr()
