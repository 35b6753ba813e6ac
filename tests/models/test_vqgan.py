"""The nearest codes of Stage A's quantizer."""

import pytest
import torch

from wuerstchen_pl.models.vqgan import VectorQuantizer


@pytest.mark.parametrize("autocast", [False, True])
def test_codes_are_the_nearest_ones_under_autocast_too(autocast: bool) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8192, 4)
    torch.nn.init.normal_(quantizer.codebook.weight)
    latents = torch.randn(2, 4, 16, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        indices = quantizer.indices(latents)
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2).double()
    nearest = torch.cdist(flat, quantizer.codebook.weight.double()).argmin(dim=1)
    assert torch.equal(indices.flatten(), nearest)
