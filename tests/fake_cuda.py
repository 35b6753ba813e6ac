"""A pretended CUDA device that counts the operations for which the host waits for it."""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

import wuerstchen_pl
from wuerstchen_pl.models.fake_cuda import DEVICE, FakeCUDA, is_on

PACKAGE = str(Path(wuerstchen_pl.__file__).parent)
aten: Any = torch.ops.aten
READS_VALUES = {
    aten._local_scalar_dense.default, aten._unique2.default, aten.bincount.default,
    aten.equal.default, aten.masked_select.default, aten.nonzero.default,
    aten.repeat_interleave.Tensor, aten.unique_consecutive.default, aten.unique_dim.default,
}  # fmt: skip
"""Operations for which the host reads values, for some only to know the size of the result."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


def reads_values(func: Any, args: tuple) -> bool:
    """Whether the host reads values of the arguments; a mask is converted to indices."""
    masks = args[1] if func in INDEXING else ()
    return func in READS_VALUES or any(m is not None and m.dtype == torch.bool for m in masks)


class Synchronizations(FakeCUDA):
    """Counts the operations for which the host waits.

    Attributes:
        lines: ``file.py:line operation`` -> number of times that the host waits there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()
        self._pinned: list[torch.UntypedStorage] = []

    def on_device(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if reads_values(func, args):
            self._count(func)
            return _made_up(func, *args, **kwargs)
        inputs, out = tree_leaves((args, kwargs)), super().on_device(func, args, kwargs)
        if self._waits_for_copy(func, [*inputs, *tree_leaves(out)], args, kwargs):
            self._count(func)
        return out

    def on_host(self, func: Any, args: tuple, kwargs: dict) -> Any:
        pins = kwargs.get("pin_memory") or func is aten._pin_memory.default
        out = super().on_host(func, args, kwargs)
        if pins:
            self._pinned.append(out.untyped_storage())
        return out

    def _waits_for_copy(self, func: Any, values: list, args: tuple, kwargs: dict) -> bool:
        """Whether an operation copies between host and device, unless from pinned memory."""
        on_host = [v for v in values if isinstance(v, Tensor) and is_on("cpu", v)]
        if func in (aten._to_copy.default, aten.copy_.default):
            non_blocking = kwargs.get("non_blocking") or args[2:] == (True,)
            return bool(on_host) and not (non_blocking and all(map(self._is_pinned, on_host)))
        return any(tensor.ndim for tensor in on_host)  # one number is passed by value

    def _is_pinned(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor):
            return False
        address = tensor.untyped_storage().data_ptr()
        return any(address == storage.data_ptr() for storage in self._pinned)

    def _count(self, func: Any) -> None:
        frames = traceback.extract_stack()
        caller = ([f for f in frames if f.filename.startswith(PACKAGE)] or frames)[-1]
        self.lines[f"{Path(caller.filename).name}:{caller.lineno} {func}"] += 1


def _made_up(func: Any, x: Tensor, _: Any = None, minlength: int = 0) -> Any:
    """A result for an operation that reads values: 1, or no indices."""
    if func is aten._local_scalar_dense.default:
        with unset_fake_temporarily():
            return torch.ones((), dtype=x.dtype).item()
    if func is aten.bincount.default:
        return x.new_zeros(minlength)
    if func is aten.nonzero.default:
        return x.new_zeros((0, x.ndim), dtype=torch.int64)
    if func is aten.index.Tensor:
        return x[:0]
    raise NotImplementedError(f"{func} waits for the device")


class _FakeAccelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Accept any device."""


class FakeCUDAStrategy(SingleDeviceStrategy):
    """One process on the pretended device.

    torch's backward pass needs a real device, so that gradients are all ones instead.
    """

    def __init__(self, precision: str) -> None:
        mixed = precision == "bf16-mixed"
        super().__init__(
            DEVICE,
            accelerator=_FakeAccelerator(),
            precision_plugin=MixedPrecision("bf16-mixed", "cuda") if mixed else Precision(),
        )

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Fill the gradients."""
        assert self.lightning_module is not None
        for parameter in self.lightning_module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
        return closure_loss

    def teardown(self) -> None:
        """Leave the weights where they are, as they have no values to copy to the host."""
