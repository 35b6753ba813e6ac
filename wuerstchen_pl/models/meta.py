"""Networks on the meta device: names and shapes, without memory and values."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWS = (torch.Tensor.normal_, torch.Tensor.uniform_)


@contextmanager
def on_meta() -> Iterator[None]:
    """Build networks on the meta device within the block.

    Initializers do nothing: on this device torch computes them in Python, which takes two thirds
    of the time that an EfficientNet takes to build.
    """
    with torch.device("meta"), _NoInitialization():
        yield


def is_building_on_meta() -> bool:
    """Whether this is within ``on_meta``, where networks are built without reading weights."""
    return torch.get_default_device().type == "meta"


class _NoInitialization(TorchFunctionMode):
    """Skips initializers, which change a tensor and return it.

    Those of ``torch.nn.init`` that torch does not let a mode see call one of ``_DRAWS``.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
