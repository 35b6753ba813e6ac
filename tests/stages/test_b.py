"""Stage B: dropout and noise of the semantic latents, losses, and guidance."""

import pytest
import torch

from tests.stages.conftest import stage_b
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.stages.stage import Batch


def test_semantic_latents_are_dropped_and_noised_sample_by_sample() -> None:
    stage = stage_b()
    semantic, noise = torch.randn(2, 4, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    # uniform numbers of four samples: zeroed, zeroed and noised, noised, unchanged
    uniform = torch.tensor([[0.04, 0.9], [0.04, 0.1], [0.06, 0.29], [0.06, 0.31]])
    t = torch.full((4,), 0.3)
    out = stage.corrupt(semantic, uniform, t, noise)
    assert torch.equal(out[:2], torch.zeros(2, 16, 2, 2))
    torch.testing.assert_close(out[2], stage.schedule.add_noise(semantic, t, noise)[2])
    assert torch.equal(out[3], semantic[3])


def test_the_loss_is_weighted_by_p2(batch: Batch) -> None:
    stage = stage_b().eval()
    x0, semantic = stage.stage_a.encode(batch["image"]), stage.encode(batch["image"])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    for time in (0.1, 0.7):
        t = torch.full((4,), time)
        xt = stage.schedule.add_noise(x0, t, noise)
        error = (stage.diffnext(xt, t, semantic) - noise).square().mean(dim=(1, 2, 3))
        weight = 1 - stage.schedule.alpha_bar(t)[0]
        torch.testing.assert_close(stage.loss(x0, t, noise, semantic, None), weight * error)


def test_the_compressor_gets_gradients_from_stage_bs_loss(batch: Batch) -> None:
    stage = stage_b()
    with torch.no_grad():
        stage.diffnext.head.weight.normal_(std=0.1)
    x0, semantic = stage.stage_a.encode(batch["image"]), stage.encode(batch["image"])
    t = torch.full((4,), 0.5)
    stage.loss(x0, t, torch.randn_like(x0), semantic, None).sum().backward()
    grads = [p.grad for p in stage.compressor.parameters()]
    assert all(g is not None and g.abs().max() > 0 for g in grads)


def test_guidance_of_one_is_the_conditional_prediction(batch: Batch) -> None:
    stage = stage_b().eval()
    with torch.no_grad():
        stage.diffnext.head.weight.normal_(std=0.1)
        semantic = stage.encode(batch["image"])
    options = {"size": (32, 32), "seeds": range(4), "num_steps": 2}
    plain = stage.decode(semantic, **options, guidance_scale=1.0)
    barely_guided = stage.decode(semantic, **options, guidance_scale=1.0 + 1e-6)  # the guided path
    torch.testing.assert_close(plain, barely_guided, atol=1e-3, rtol=0)
    assert (stage.decode(semantic, **options, guidance_scale=4.0) - plain).abs().max() > 1e-3


def test_mismatched_channels_are_refused_with_both_numbers() -> None:
    wrong = DiffNeXt(
        latent_channels=8, widths=[16], num_blocks=[1], num_heads=[None],
        inject_semantic=[True], cond_dim=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"latent_channels=8, but .* have 4"):
        stage_b(diffnext=wrong)
