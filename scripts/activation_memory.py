"""Count what a training step keeps for the backward pass, on a GPU that need not exist.

The networks run on tensors without data on a pretended GPU, in bfloat16 autocast, with the outputs
that flash attention saves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from wuerstchen_pl.models.wrapping import checkpoint_activations

Build = Callable[[], tuple[list[nn.Module], Callable[[int], Any]]]
"""Makes the networks of a step, and its forward pass as a function of the batch size."""


class SavedBytes(NamedTuple):
    """Bytes of activations per sample, without and with activation checkpointing."""

    plain: float
    checkpointed: float


def saved_bytes(build: Build) -> SavedBytes:
    """Count the activations of a step; ``build`` is called on the meta device."""
    return SavedBytes(_per_sample(build, checkpoint=False), _per_sample(build, checkpoint=True))


def _per_sample(build: Build, *, checkpoint: bool) -> float:
    with torch.device("meta"):
        networks, forward = build()
    with _pretended_gpu(), torch.device("cuda"):
        for network in networks:
            network.to_empty(device="cuda")
            if checkpoint:
                checkpoint_activations(network)
        weights = {p.untyped_storage()._cdata for net in networks for p in net.parameters()}
        # what does not grow with the batch, such as weights in bfloat16, cancels out
        return (_saved(forward, 4, weights) - _saved(forward, 2, weights)) / 2


def _saved(forward: Callable[[int], Any], batch_size: int, weights: set[int]) -> int:
    storages: dict[int, torch.UntypedStorage] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # kept, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = forward(batch_size)
    del output
    return sum(s.nbytes() for address, s in storages.items() if address not in weights)


@contextmanager
def _pretended_gpu() -> Iterator[None]:
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autocast("cuda", torch.bfloat16),
        _FlashAttention(),
    ):
        yield


class _FlashAttention(TorchFunctionMode):
    """Replaces attention, which a pretended GPU would compute with all of its scores in memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attend.apply(*(x.to(torch.bfloat16) for x in args[:3]))
        return func(*args, **kwargs or {})


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q[..., 0].float())  # and the sums of exponentials
        return out
