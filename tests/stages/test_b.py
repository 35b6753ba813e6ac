"""Stage B: dropout and noise of the semantic latents, losses, and guidance."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.stages.conftest import fit, stage_b
from wuerstchen_pl.diffusion.sampler import generators_from_seeds, randn
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.stages.stage import Batch


def text_options(weights: str | None = "clip.pt", text_dim: int | None = 16) -> dict:
    """A text encoder, and a denoiser whose states it makes; either may be missing."""
    torch.manual_seed(0)
    encoder = TextEncoder(width=16, depth=1, num_heads=2, context_length=8)
    encoder.weights = weights
    diffnext = DiffNeXt(
        widths=[16, 24], num_blocks=[1, 1], num_heads=[None, 2],
        inject_semantic=[True, True], cond_dim=8, dropout=0.0, text_dim=text_dim,
    )  # fmt: skip
    return {"text_encoder": encoder, "diffnext": diffnext}


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


def test_a_text_encoder_and_a_denoiser_that_disagree_are_refused() -> None:
    options = text_options()
    with pytest.raises(ValueError, match="text_dim=None and text_encoder disagree"):
        stage_b(text_encoder=options["text_encoder"])
    with pytest.raises(ValueError, match="text_dim=16 and text_encoder disagree"):
        stage_b(diffnext=options["diffnext"])
    with pytest.raises(ValueError, match="leaves a frozen text encoder random"):
        stage_b(**text_options(weights=None))
    assert stage_b(**options).text_encoder is options["text_encoder"]


@pytest.mark.parametrize(("prob", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_captions_are_dropped_at_the_given_rate(prob: float, share: float, batch: Batch) -> None:
    stage = stage_b(**text_options(), text_drop_prob=prob)
    encoded: list[str] = []
    text = stage.text

    def recording_text(captions: Sequence[str]) -> Tensor | None:
        encoded.extend(captions)
        return text(captions)

    stage.text = recording_text  # type: ignore[method-assign]
    fit(stage, batch, 6)
    tolerance = 0.25 if prob == 0.5 else 0
    assert encoded.count("") / 24 == pytest.approx(share, abs=tolerance)


def test_captions_change_the_loss_of_a_stage_with_text_only(batch: Batch) -> None:
    other = {**batch, "caption": ["a ship"] * 4}
    for options, differs in ((text_options(), True), ({}, False)):
        stage = stage_b(**options).eval()
        with torch.no_grad():
            for parameter in stage.diffnext.parameters():
                parameter.normal_(std=0.2)
        losses, other_losses = (stage.validation_losses(b)[1] for b in (batch, other))
        assert torch.equal(losses, other_losses) != differs


def test_latents_have_the_sizes_that_the_stage_promises() -> None:
    stage = stage_b().eval()
    unit = stage.size_multiple
    for height, width in ((unit, 3 * unit), (2 * unit, unit)):
        images = torch.rand(1, 3, height, width)
        assert stage.encode(images).shape == (
            1, stage.latent_channels, *(stage.semantic_size(height, width) or ()),
        )  # fmt: skip
        x0 = stage.stage_a.encode(images)
        assert x0.shape[-2:] == (
            height // stage.stage_a.size_multiple, width // stage.stage_a.size_multiple,
        )  # fmt: skip
        assert x0.shape[-1] % stage.diffnext.size_multiple == 0
    assert unit == stage.stage_a.size_multiple * stage.diffnext.size_multiple


def test_a_reconstruction_is_the_decoded_encoding_in_twelve_steps_without_guidance(
    batch: Batch, capsys: pytest.CaptureFixture
) -> None:
    stage = stage_b().eval()
    with torch.no_grad():
        for parameter in stage.diffnext.parameters():
            parameter.normal_(std=0.1)
    images = batch["image"][:2, :, :, :16]
    options = {"size": (32, 16), "seeds": [3, 1]}
    semantic = stage.encode(images)
    expected = stage.decode(
        semantic, **options, num_steps=12, guidance_scale=1.0, method="ddpm", captions=["", ""]
    )
    assert torch.equal(stage.decode(semantic, **options), expected)
    assert torch.equal(stage.reconstruct(images, seeds=[3, 1]), expected)
    few = stage.decode(semantic, **options, num_steps=2)
    assert torch.equal(stage.reconstruct(images, seeds=[3, 1], num_steps=2), few)
    assert not torch.equal(few, expected)
    assert capsys.readouterr().err == ""  # no progress bar


def test_a_perfect_denoiser_reconstructs_the_original_in_one_step(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_b().eval()
    x0 = stage.stage_a.encode(batch["image"])
    noise = randn(x0.shape, generators_from_seeds(range(4)), x0.device)
    with torch.no_grad():
        noised = stage.stage_a.decode(stage.schedule.add_noise(x0, torch.full((4,), 0.5), noise))
        monkeypatch.setattr(stage.diffnext, "forward", lambda *args: noise)
        columns = stage.example_grid(batch)
    expected = stage.stage_a.reconstruct(batch["image"])
    torch.testing.assert_close(columns["one step (EMA)"], expected, atol=1e-4, rtol=0)
    assert torch.equal(columns["noised, t=0.5"], noised)
