"""Stage C: caption dropout, guidance, latent scaling, and the text encoder."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.stages.conftest import fit, stage_c
from wuerstchen_pl.diffusion.sampler import generators_from_seeds, randn
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.stages.stage import Batch


def test_captions_are_dropped_sample_by_sample(batch: Batch) -> None:
    stage = stage_c(caption_drop_prob=0.5)
    encoded: list[str] = []
    text = stage.text

    def recording_text(captions: Sequence[str]) -> Tensor:
        encoded.extend(captions)
        return text(captions)

    stage.text = recording_text  # type: ignore[method-assign]
    fit(stage, batch, 20)
    batches = [encoded[i : i + 4] for i in range(0, 80, 4)]
    assert encoded.count("") / 80 == pytest.approx(0.5, abs=0.2)
    assert any("" in rows and set(rows) != {""} for rows in batches)  # not per batch
    assert all(
        caption in ("", original)
        for rows in batches
        for caption, original in zip(rows, batch["caption"], strict=True)
    )


def test_latents_are_scaled_to_the_prior_and_back(batch: Batch) -> None:
    stage = stage_c(semantic_shift=1.0, semantic_scale=42.0).eval()
    semantic = stage.stage_b.encode(batch["image"])
    latents = stage.encode(batch["image"])
    torch.testing.assert_close(latents, (semantic + 1) / 42)
    torch.testing.assert_close(stage.scaling.denormalize(latents), semantic)


def test_the_compressors_statistics_do_not_change_while_stage_c_trains(batch: Batch) -> None:
    stage = stage_c()
    before = stage.stage_b.compressor.norm.running_mean.clone()
    fit(stage, batch, 2)
    assert torch.equal(stage.stage_b.compressor.norm.running_mean, before)


def test_guidance_of_one_is_the_conditional_prediction() -> None:
    stage = stage_c().eval()
    with torch.no_grad():
        stage.prior.head.weight.normal_(std=0.1)
    options = {"size": (32, 32), "seeds": [1, 2], "num_steps": 3}
    captions = ["red apple", "green frog"]
    plain = stage.sample(captions, **options, guidance_scale=1.0)
    barely_guided = stage.sample(captions, **options, guidance_scale=1.0 + 1e-6)  # the guided path
    torch.testing.assert_close(plain, barely_guided, atol=1e-2, rtol=1e-2)
    guided = stage.sample(captions, **options, guidance_scale=4.0)
    assert (guided - plain).abs().max() > 1e-3
    # guidance has no effect on the empty caption
    empty = [stage.sample(["", ""], **options, guidance_scale=g) for g in (1.0, 4.0)]
    torch.testing.assert_close(*empty, atol=1e-2, rtol=1e-2)


def test_a_frozen_text_encoder_gets_no_gradient_and_is_not_saved(batch: Batch) -> None:
    with pytest.raises(ValueError, match="leaves a frozen text encoder random"):
        stage_c(train_text_encoder=False)
    encoder = TextEncoder(width=16, depth=1, num_heads=2, context_length=8)
    encoder.weights = "clip.pt"
    stage = stage_c(train_text_encoder=False, text_encoder=encoder)
    before = {k: v.clone() for k, v in stage.text_encoder.state_dict().items()}
    fit(stage, batch, 2)
    assert all(torch.equal(before[k], v) for k, v in stage.text_encoder.state_dict().items())
    assert not [key for key in stage.state_dict() if "text_encoder" in key]


def test_a_prior_that_does_not_fit_the_frozen_stage_or_the_text_is_refused() -> None:
    options: dict = {"width": 16, "depth": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=r"latent_channels=8, but .* of 16 channels"):
        stage_c(prior=Prior(latent_channels=8, text_dim=16, **options))
    with pytest.raises(ValueError, match=r"text_dim=24, but text_encoder.width=16"):
        stage_c(prior=Prior(latent_channels=16, text_dim=24, **options))


def test_the_loss_is_weighted_in_the_given_form(batch: Batch) -> None:
    """Relative to the loss without a weight, which is the error of the predicted noise."""
    generator = torch.Generator().manual_seed(0)
    losses = {}
    for form in ("none", "code", "paper"):
        stage = stage_c(p2=form).eval()
        x0, t = stage.latents(batch), torch.tensor([0.1, 0.4, 0.7, 1.0])
        noise = torch.randn(x0.shape, generator=generator.manual_seed(0))
        text = stage.text(batch["caption"])
        losses[form] = stage.loss(x0, t, noise, text)
    xt, alpha_bar = stage.schedule.add_noise(x0, t, noise), stage.schedule.alpha_bar(t)
    error = (stage.prior(xt, t, text) - noise).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses["none"], error)
    torch.testing.assert_close(losses["code"], error * (1 - alpha_bar))
    torch.testing.assert_close(losses["paper"], error * (1 - alpha_bar) / (1 + alpha_bar))


def test_the_default_sampler_is_ddpm_in_sixty_steps_with_guidance_of_four(
    capsys: pytest.CaptureFixture,
) -> None:
    stage = stage_c().eval()
    with torch.no_grad():
        stage.prior.head.weight.normal_(std=0.1)
    captions, options = ["red apple"], {"size": (32, 32), "seeds": [1]}
    expected = stage.sample(captions, **options, num_steps=60, guidance_scale=4.0, method="ddpm")
    assert torch.equal(stage.sample(captions, **options), expected)
    ddpm, ddim = (
        stage.sample(captions, **options, num_steps=2, method=method) for method in ("ddpm", "ddim")
    )
    assert not torch.equal(ddpm, ddim)
    assert capsys.readouterr().err == ""  # no progress bar


def test_latents_have_the_compressors_size_for_images_of_any_size() -> None:
    stage = stage_c()
    assert stage.size_multiple == 1
    height, width = 67, 101
    h, w = stage.encode(torch.rand(1, 3, height, width)).shape[-2:]
    assert stage.semantic_size(height, width) == (h, w)
    # up to the part of a position at the edge
    assert 0 <= h - height / stage.resolution_multiple < 1
    assert 0 <= w - width / stage.resolution_multiple < 1


def test_a_grid_shows_images_of_sizes_that_stage_b_cannot_divide() -> None:
    stage, size = stage_c().eval(), (35, 61)
    assert any(side % stage.stage_b.size_multiple for side in size)
    columns = stage.example_grid({"image": torch.rand(1, 3, *size), "caption": ["red apple"]})
    assert {tuple(images.shape[-2:]) for images in columns.values()} == {size}


@pytest.mark.parametrize("cached", [False, True])
def test_a_perfect_denoiser_recovers_the_latents_in_one_step(
    cached: bool, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the decoder only sums the latents, so that images show the latents themselves."""
    stage = stage_c(semantic_shift=1.0, semantic_scale=2.0).eval()
    semantic = stage.encode_semantic(batch["image"]).detach()
    x0 = (semantic + 1) / 2
    noise = randn(x0.shape, generators_from_seeds(range(4)), x0.device)
    xt = stage.schedule.add_noise(x0, torch.full((4,), 0.5), noise)
    monkeypatch.setattr(stage.prior, "forward", lambda *args: noise)
    monkeypatch.setattr(stage, "decode_semantic", lambda semantic, **_: semantic.sum(1))
    from_cache = {"semantic": semantic, "caption": batch["caption"], "size": (32, 32)}
    columns = stage.example_grid(from_cache if cached else batch)  # type: ignore[arg-type]
    original = semantic.sum(1) if cached else batch["image"]
    torch.testing.assert_close(columns["original"], original)
    torch.testing.assert_close(columns["noised, t=0.5"], (xt * 2 - 1).sum(1))
    torch.testing.assert_close(columns["one step (EMA)"], semantic.sum(1), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_samples_depend_on_the_text(batch: Batch) -> None:
    stage = stage_c(caption_drop_prob=0.0)
    # distinct latents, as those of an untrained compressor are nearly equal
    target = torch.randn(4, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    stage.stage_b.encode = lambda images: target  # type: ignore[method-assign]
    fit(stage, batch, 200)
    stage.eval()
    captions = batch["caption"]
    sampled = stage.sample(
        captions, size=(32, 32), seeds=range(4), num_steps=10, guidance_scale=1.0
    )
    nearest = torch.cdist(sampled.flatten(1), target.flatten(1)).argmin(dim=1)
    assert nearest.tolist() == [0, 1, 2, 3]
