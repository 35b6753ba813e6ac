"""Scaled latents."""

import torch

from wuerstchen_pl.diffusion.latent_scaling import LatentScaling


def test_scaled_latents_are_shifted_before_they_are_divided() -> None:
    semantic = torch.tensor([-1.0, 0.0, 41.0])
    scaling = LatentScaling(shift=1.0, scale=42.0)
    torch.testing.assert_close(scaling.normalize(semantic), torch.tensor([0.0, 1 / 42, 1.0]))
    torch.testing.assert_close(scaling.denormalize(scaling.normalize(semantic)), semantic)
    plain = LatentScaling()
    assert torch.equal(plain.normalize(semantic), semantic)
    assert torch.equal(plain.denormalize(semantic), semantic)
