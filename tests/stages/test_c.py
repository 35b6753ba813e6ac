"""Stage C: caption dropout, guidance, latent scaling, and the text encoder."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.stages.conftest import fit, stage_c
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
