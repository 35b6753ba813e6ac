"""Layer norms under autocast."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wuerstchen_pl.models.layers import LayerNorm2d


def test_layer_norms_keep_no_float32_copy_and_add_no_error_under_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With CUDA's autocast, which runs layer norms in float32; the CPU's does not, so simulate it.

    Saved for the backward pass are the input and two numbers per pixel.
    """
    layer_norm = F.layer_norm

    def as_on_cuda(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return layer_norm(
            x.float() if torch.is_autocast_enabled("cpu") else x, *args, **options
        )  # fmt: skip

    monkeypatch.setattr(F, "layer_norm", as_on_cuda)
    channels, saved = 64, {}

    def record(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = (3 * torch.randn(2, channels, 4, 4)).bfloat16().requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        normed = LayerNorm2d(channels)(x)
    pixels = 2 * 4 * 4
    assert sum(saved.values()) == pixels * (2 * channels + 2 * 2)
    exact = layer_norm(x.detach().double().permute(0, 2, 3, 1), (channels,), eps=1e-6)
    assert torch.equal(normed, exact.permute(0, 3, 1, 2).bfloat16())  # one rounding
    assert torch.equal(LayerNorm2d(channels)(x.detach().float()).bfloat16(), normed)


@pytest.mark.gpu
def test_layer_norms_stay_in_bfloat16_under_autocast_on_a_gpu() -> None:
    x = torch.randn(2, 8, 4, 4, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        assert LayerNorm2d(8)(x).dtype == torch.bfloat16
