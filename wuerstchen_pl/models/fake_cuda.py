"""A pretended CUDA device: its tensors have shapes and types, but neither memory nor values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda:0")
_PIN = torch.ops.aten._pin_memory.default


class FakeCUDA(TorchDispatchMode):
    """Computes on the host as usual; tensors on ``DEVICE`` are fake."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if any(is_on("cuda", value) for value in tree_leaves((args, kwargs))):
            return self.on_device(func, args, kwargs)
        return self.on_host(func, args, kwargs)

    def on_device(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """An operation with a tensor or a result on the device."""
        return func(*args, **kwargs)

    def on_host(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Any other operation; memory is never pinned, as that needs a driver."""
        kwargs.pop("pin_memory", None)
        with unset_fake_temporarily():
            return args[0].clone() if func is _PIN else func(*args, **kwargs)


Mode = TypeVar("Mode", bound=FakeCUDA)


@contextmanager
def fake_cuda(mode: Mode) -> Iterator[Mode]:
    """Pretend that there is a device within the block, as ``mode`` does."""
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.get_rng_state"),
        mock.patch("torch.cuda.set_rng_state"),
        FakeTensorMode(allow_non_fake_inputs=True),
        mode,
    ):
        yield mode


class FlashAttention(TorchFunctionMode):
    """Attention that saves what fused kernels save, instead of all of its scores."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (_autocast(x) for x in args[:3])
            dropout = kwargs.get("dropout_p", 0.0)
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout)[0]
        return func(*args, **kwargs)


def _autocast(tensor: Tensor) -> Tensor:
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def is_on(kind: str, value: Any) -> bool:
    """Whether a value is a tensor on a kind of device, or such a device."""
    device = value.device if isinstance(value, Tensor) else value
    return isinstance(device, torch.device) and device.type == kind
