"""Stage A's own: codebook, discriminator, what counts when."""

import math

import pytest
import torch

from tests.stages.conftest import fit, stage_a
from wuerstchen_pl.models.vqgan import VQGAN, VectorQuantizer, codebook_usage
from wuerstchen_pl.stages.stage import Batch


def test_the_loss_is_the_weighted_sum_of_its_terms(batch: Batch) -> None:
    stage = stage_a()
    loss, _, terms = stage.generator_loss(batch["image"], quantize=True, adversarial=True)
    wanted = (
        terms["mse"]
        + 0.1 * terms["perceptual"]
        + 0.01 * terms["adversarial"]
        + terms["codebook"]
        + 0.25 * terms["commitment"]
    )
    torch.testing.assert_close(loss, wanted)


def test_without_quantization_the_codes_do_not_reach_the_image(batch: Batch) -> None:
    stage = stage_a().eval()
    _, before, _ = stage.generator_loss(batch["image"], quantize=False, adversarial=False)
    _, coded, _ = stage.generator_loss(batch["image"], quantize=True, adversarial=False)
    with torch.no_grad():
        stage.vqgan.quantizer.codebook.weight.normal_()
    _, after, _ = stage.generator_loss(batch["image"], quantize=False, adversarial=False)
    _, recoded, _ = stage.generator_loss(batch["image"], quantize=True, adversarial=False)
    assert torch.equal(before, after)
    assert not torch.equal(coded, recoded)


@pytest.mark.parametrize(("prob", "share"), [(0.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_quantization_is_dropped_at_its_rate(prob: float, share: float, batch: Batch) -> None:
    stage = stage_a(quantize_drop_prob=prob)
    seen = []
    loss = stage.generator_loss

    def spied(images: torch.Tensor, *, quantize: bool, adversarial: bool) -> object:
        seen.append(quantize)
        return loss(images, quantize=quantize, adversarial=adversarial)

    stage.generator_loss = spied  # type: ignore[method-assign, assignment]
    fit(stage, batch, 40)
    assert seen.count(False) / 40 == pytest.approx(share, abs=0.25 if prob == 0.5 else 0)


def test_the_discriminator_learns_before_it_counts(batch: Batch) -> None:
    with_it, without = stage_a(adversarial_start_step=6), stage_a(adversarial_start_step=10**9)
    start = [p.detach().clone() for p in with_it.discriminator.parameters()]
    fit(with_it, batch, 6)
    fit(without, batch, 6)
    moved = zip(start, with_it.discriminator.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)
    pairs = list(zip(with_it.vqgan.parameters(), without.vqgan.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)  # it has not counted yet

    with_it, without = stage_a(adversarial_start_step=6), stage_a(adversarial_start_step=10**9)
    fit(with_it, batch, 8)
    fit(without, batch, 8)
    pairs = list(zip(with_it.vqgan.parameters(), without.vqgan.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_one_optimizer_of_two_groups_does_what_two_do(batch: Batch) -> None:
    options = {
        "adversarial_start_step": 0,
        "quantize_drop_prob": 0.0,
        "codebook_restart_every_steps": 99,
    }
    stage, other = stage_a(**options), stage_a(**options)
    fit(stage, batch, 3)
    assert other.optimizer_factory is not None
    parts = (other.vqgan, other.discriminator)
    optimizers = [other.optimizer_factory(part.parameters()) for part in parts]
    other.train()
    for _ in range(3):
        images = batch["image"]
        loss, decoded, _ = other.generator_loss(images, quantize=True, adversarial=True)
        for optimizer, each in zip(optimizers, (loss, None), strict=True):
            each = other.discriminator_loss(images, decoded) if each is None else each
            optimizer.zero_grad()
            each.backward()
            optimizer.step()
    pairs = zip(stage.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_each_part_is_clipped_by_its_own_norm(batch: Batch) -> None:
    stage = stage_a()
    fit(stage, batch, 1, gradient_clip_val=0.01)
    norms = [
        float(torch.stack([p.grad.norm() for p in part.parameters() if p.grad is not None]).norm())
        for part in (stage.vqgan, stage.discriminator)
    ]
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_the_discriminators_loss_is_binary_cross_entropy(batch: Batch) -> None:
    stage = stage_a().eval()
    images, fake = batch["image"], batch["image"].flip(0) * 0.5
    real_p, fake_p = stage.discriminator(images), stage.discriminator(fake)
    wanted = -0.5 * (real_p.log().mean() + (1 - fake_p).log().mean())
    torch.testing.assert_close(stage.discriminator_loss(images, fake), wanted)


def test_unused_codes_are_moved_onto_latents_and_so_is_their_average(batch: Batch) -> None:
    stage = stage_a(codebook_restart_every_steps=3, quantize_drop_prob=0.0)
    codebook = stage.vqgan.quantizer.codebook.weight
    with torch.no_grad():
        codebook[8:] = 100.0  # nothing is near
    fit(stage, batch, 2)
    assert codebook[8:].min() > 90
    stage = stage_a(codebook_restart_every_steps=3, quantize_drop_prob=0.0)
    codebook = stage.vqgan.quantizer.codebook.weight
    with torch.no_grad():
        codebook[8:] = 100.0
    fit(stage, batch, 3)
    assert codebook[8:].abs().max() < 10
    shadow = stage.ema.shadow["vqgan.quantizer.codebook.weight"]
    assert torch.equal(shadow[8:], codebook[8:].detach())


def test_codebook_use_of_known_counts() -> None:
    perplexity, dead = codebook_usage(torch.tensor([4.0, 4.0, 4.0, 4.0, 0.0]))
    assert float(perplexity) == pytest.approx(4)
    assert float(dead) == 1
    perplexity, _ = codebook_usage(torch.tensor([3.0, 1.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(perplexity) == pytest.approx(math.exp(entropy))


def test_the_nearest_code_is_chosen_and_gradients_pass_straight_through() -> None:
    quantizer = VectorQuantizer(8, 3)
    latents = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        quantizer.codebook.weight.normal_(generator=torch.Generator().manual_seed(1))
    found = quantizer(latents)
    flat = latents.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = torch.cdist(flat, quantizer.codebook.weight).argmin(dim=1)
    assert torch.equal(found.indices.flatten(), nearest)
    weight = torch.randn_like(found.latents)
    (found.latents * weight).sum().backward()
    torch.testing.assert_close(latents.grad, weight)


def test_latents_are_measured_to_unit_variance() -> None:
    torch.manual_seed(0)
    net = VQGAN(width=16, bottleneck_blocks=1, codebook_size=16)
    with torch.no_grad():
        net.latent_norm.weight.fill_(3.0)
    images = torch.rand(8, 3, 32, 32)
    for _ in range(600):
        net.features(images)
    with torch.no_grad():
        assert float(net.eval().encode(images).std()) == pytest.approx(1, abs=0.05)
        decoded = net.decode(net.encode(images))
        torch.testing.assert_close(decoded, net.decode_features(net.features(images)))
