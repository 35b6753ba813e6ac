"""Version 1's Stage B: the authors' loss, its validation, and sampling of its own tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diffusion.test_tokens import io, net  # noqa: F401
from tests.stages.conftest import stage_a, token_stage_b
from wuerstchen_pl.models.paella import Paella
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.stages.stage import Batch


def test_the_loss_equals_the_authors(net: Paella, io: dict[str, Tensor]) -> None:  # noqa: F811
    """With the authors' network and random numbers."""
    encoder = TextEncoder(width=40, depth=1, num_heads=2, context_length=9)
    encoder.weights = "clip.pt"
    stage = token_stage_b(stage_a=codes_of(64), paella=net, text_encoder=encoder)
    which = (io["train.random_x"] + 0.5) / 64
    uniform = torch.stack([io["train.mask_uniform"], which], dim=1)
    losses = stage.loss(
        io["train.tokens"], io["train.t"], uniform, io["train.effnet"], io["train.byt5"]
    )
    assert float(losses.mean().detach()) == pytest.approx(float(io["train.loss"]), abs=1e-5)


def codes_of(size: int) -> Any:
    frozen = stage_a()
    frozen.vqgan.quantizer.codebook = torch.nn.Embedding(size, frozen.vqgan.latent_channels)
    return frozen


def test_tokens_are_those_of_stage_a_from_images_and_from_cached_latents(batch: Batch) -> None:
    stage = token_stage_b()
    vqgan = stage.stage_a.vqgan
    vqgan.scale_factor.fill_(0.4)
    expected = vqgan.quantizer.indices(vqgan.features(batch["image"]))
    assert torch.equal(stage.latents(batch), expected)
    cached: Any = {**batch, "latents": stage.stage_a.encode(batch["image"])}
    del cached["image"]
    assert torch.equal(stage.latents(cached), expected)


def test_validation_replaces_the_share_of_its_times(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers from normal noise are uniform, and the same in every batch."""
    stage = token_stage_b().eval()
    seen: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(
        stage, "loss", lambda tokens, t, uniform, *_: seen.append((t, uniform)) or t.clone()
    )
    many: Any = {key: list(value) * 16 for key, value in batch.items() if key == "caption"}
    many |= {"image": batch["image"].repeat(16, 1, 1, 1), "key": [str(i) for i in range(64)]}
    stage.validation_losses(many)
    uniform = torch.cat([uniform for _, uniform in seen])
    assert 0 <= uniform.min() < uniform.max() < 1
    histogram = torch.histc(uniform, bins=10, min=0, max=1) / uniform.numel()
    torch.testing.assert_close(histogram, torch.full((10,), 0.1), atol=5e-3, rtol=0)
    first = [(t[:4].clone(), u[:4].clone()) for t, u in seen]
    seen.clear()
    stage.validation_losses({**many, "image": batch["image"], "key": ["0", "1", "2", "3"]})
    for (t, u), (t_alone, u_alone) in zip(first, seen, strict=True):
        assert torch.equal(t, t_alone)
        assert torch.equal(u, u_alone)


def test_masked_tokens_do_not_count(batch: Batch) -> None:
    stage = token_stage_b().eval()
    torch.nn.init.normal_(stage.paella.head.weight)
    tokens, semantic = stage.latents(batch), stage.encode(batch["image"])
    t, uniform = torch.full((4,), 0.5), torch.rand(4, 2, *tokens.shape[1:])
    mask = torch.zeros(4, 1, 32, 32)
    mask[..., :16] = 1
    masked = stage.loss(tokens, t, uniform, semantic, None, mask)
    changed = tokens.clone()
    changed[:, :, 4:] = (changed[:, :, 4:] + 1) % 16  # targets outside the mask
    where = torch.ones_like(uniform)
    where[:, 0] = 0  # all tokens are replaced, so that the network does not see the clean ones
    where[:, 1] = uniform[:, 1]
    expected = stage.loss(tokens, t, where, semantic, None, mask)
    torch.testing.assert_close(stage.loss(changed, t, where, semantic, None, mask), expected)
    assert not torch.allclose(masked, stage.loss(tokens, t, uniform, semantic, None))


def test_a_perfect_classifier_reconstructs_the_tokens(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = token_stage_b().eval()
    tokens = stage.latents(batch)

    def perfect(noised: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        one_hot = torch.nn.functional.one_hot(tokens, 16).permute(0, 3, 1, 2)
        return 100.0 * one_hot

    monkeypatch.setattr(stage.paella, "predict_logits", perfect)
    images = stage.reconstruct(batch["image"], seeds=range(4))
    vqgan = stage.stage_a.vqgan
    expected = vqgan.decode_features(vqgan.quantizer.lookup(tokens)).clamp(0, 1)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_a_codebook_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"paella.codebook_size=16, but Stage A has 8 codes"):
        token_stage_b(stage_a=codes_of(8))
