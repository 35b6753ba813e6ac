"""Stage A: losses, codebook and discriminator."""

import math

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from tests.stages.conftest import fit, stage_a
from wuerstchen_pl.models.vqgan import VQGAN, VectorQuantizer, codebook_usage
from wuerstchen_pl.stages.a import count_codes
from wuerstchen_pl.stages.stage import Batch


def test_the_loss_is_the_weighted_sum_of_its_terms(batch: Batch) -> None:
    stage = stage_a()
    loss, _, terms = stage.generator_loss(batch["image"], quantize=True, adversarial=True)
    expected = (
        terms["mse"]
        + 0.1 * terms["perceptual"]
        + 0.01 * terms["adversarial"]
        + terms["codebook"]
        + 0.25 * terms["commitment"]
    )
    torch.testing.assert_close(loss, expected)


def test_without_quantization_the_codes_do_not_affect_the_image(batch: Batch) -> None:
    stage = stage_a().eval()
    _, before, _ = stage.generator_loss(batch["image"], quantize=False, adversarial=False)
    _, coded, _ = stage.generator_loss(batch["image"], quantize=True, adversarial=False)
    with torch.no_grad():
        stage.vqgan.quantizer.codebook.weight.normal_()
    _, after, _ = stage.generator_loss(batch["image"], quantize=False, adversarial=False)
    _, recoded, _ = stage.generator_loss(batch["image"], quantize=True, adversarial=False)
    assert torch.equal(before, after)
    assert not torch.equal(coded, recoded)


@pytest.mark.parametrize(("prob", "steps"), [(0.0, 6), (1.0, 6), (0.5, 40)])
def test_quantization_is_skipped_at_the_given_rate(prob: float, steps: int, batch: Batch) -> None:
    stage = stage_a(quantize_drop_prob=prob)
    quantize_flags = []
    loss = stage.generator_loss

    def recording_loss(images: torch.Tensor, *, quantize: bool, adversarial: bool) -> object:
        quantize_flags.append(quantize)
        return loss(images, quantize=quantize, adversarial=adversarial)

    stage.generator_loss = recording_loss  # type: ignore[method-assign, assignment]
    fit(stage, batch, steps)
    tolerance = 0.25 if prob == 0.5 else 0
    assert quantize_flags.count(False) / steps == pytest.approx(prob, abs=tolerance)


def test_the_discriminator_trains_before_its_loss_is_applied(batch: Batch) -> None:
    with_it, without = stage_a(adversarial_start_step=6), stage_a(adversarial_start_step=10**9)
    start = [p.detach().clone() for p in with_it.discriminator.parameters()]
    fit(with_it, batch, 6)
    fit(without, batch, 6)
    pairs = list(zip(start, with_it.discriminator.parameters(), strict=True))
    assert all(not torch.equal(a, b) for a, b in pairs)
    pairs = list(zip(with_it.vqgan.parameters(), without.vqgan.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)  # its loss is not applied yet

    with_it, without = stage_a(adversarial_start_step=6), stage_a(adversarial_start_step=10**9)
    fit(with_it, batch, 7)
    fit(without, batch, 7)
    pairs = list(zip(with_it.vqgan.parameters(), without.vqgan.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_one_optimizer_with_two_groups_equals_two_optimizers(batch: Batch) -> None:
    options = {
        "adversarial_start_step": 0,
        "quantize_drop_prob": 0.0,
        "codebook_restart_every_steps": 99,
    }
    stage, reference = stage_a(**options), stage_a(**options)
    fit(stage, batch, 3)
    assert reference.optimizer_factory is not None
    parts = (reference.vqgan, reference.discriminator)
    optimizers = [reference.optimizer_factory(part.parameters()) for part in parts]
    reference.train()
    for _ in range(3):
        images = batch["image"]
        generator_loss, decoded, _ = reference.generator_loss(
            images, quantize=True, adversarial=True
        )
        for optimizer, loss in zip(optimizers, (generator_loss, None), strict=True):
            loss = reference.discriminator_loss(images, decoded) if loss is None else loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    pairs = zip(stage.parameters(), reference.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_vqgan_and_discriminator_are_clipped_separately(batch: Batch) -> None:
    stage = stage_a()
    fit(stage, batch, 1, gradient_clip_val=0.01)
    norms = [
        float(torch.stack([p.grad.norm() for p in part.parameters() if p.grad is not None]).norm())
        for part in (stage.vqgan, stage.discriminator)
    ]
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_the_discriminator_loss_is_binary_cross_entropy(batch: Batch) -> None:
    stage = stage_a().eval()
    images, fake = batch["image"], batch["image"].flip(0) * 0.5
    real_p, fake_p = stage.discriminator(images), stage.discriminator(fake)
    expected = -0.5 * (real_p.log().mean() + (1 - fake_p).log().mean())
    torch.testing.assert_close(stage.discriminator_loss(images, fake), expected)


def test_unused_codes_and_their_ema_are_restarted(batch: Batch) -> None:
    stage = stage_a(codebook_restart_every_steps=3, quantize_drop_prob=0.0)
    codebook = stage.vqgan.quantizer.codebook.weight
    with torch.no_grad():
        codebook[8:] = 100.0  # far from all latents
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


def test_a_restart_replaces_only_the_unused_codes_and_resets_their_counts(batch: Batch) -> None:
    often, never = (
        stage_a(codebook_restart_every_steps=n, quantize_drop_prob=0.0) for n in (3, 99)
    )
    logged: dict[str, float] = {}
    often.log = lambda name, value, **_: logged.update({name: float(value)})  # type: ignore[method-assign]
    fit(often, batch, 3)
    fit(never, batch, 3)
    positions = 4 * 8 * 8
    assert never.code_uses.sum() == 3 * positions
    assert often.code_uses.sum() == 0
    dead = never.code_uses == 0
    assert 0 < logged["train/restarted_codes"] == dead.sum() < len(dead)
    codes, kept = (stage.vqgan.quantizer.codebook.weight.detach() for stage in (often, never))
    assert torch.equal(codes[~dead], kept[~dead])
    latents = {tuple(row) for row in often._latents.tolist()}
    assert {tuple(row) for row in codes[dead].tolist()} <= latents


def test_validation_logs_the_psnr_and_the_codes_of_unique_samples(batch: Batch) -> None:
    stage = stage_a().eval()
    other: Batch = {**batch, "image": batch["image"].flip(0) * 0.5}
    copy: Batch = {**batch, "is_unique": False}  # type: ignore[typeddict-unknown-key]
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with torch.no_grad():
        images = torch.cat([batch["image"], other["image"]])
        error = (stage.reconstruct(images) - images).square().mean(dim=(1, 2, 3))
        outputs = [
            stage.generator_loss(b["image"], quantize=True, adversarial=False)
            for b in (batch, other)
        ]
    uses = torch.cat([terms["indices"].flatten() for _, _, terms in outputs]).bincount(minlength=16)
    perplexity, dead = codebook_usage(uses)
    expected = {
        "val/psnr": -10 * error.log10().mean(),
        "val/loss": torch.stack([loss for loss, _, _ in outputs]).mean(),
        "val/codebook_perplexity": perplexity,
        "val/codebook_dead": dead,
    }
    for _ in range(2):  # the second time, from counts of zero
        loader = DataLoader([batch, other, copy], batch_size=None)  # type: ignore[arg-type]
        (metrics,) = trainer.validate(stage, loader, verbose=False)
        assert metrics == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)


def test_the_grid_has_a_column_of_the_nearest_codes(batch: Batch) -> None:
    stage = stage_a().eval()
    with torch.no_grad():
        features = stage.vqgan.features(batch["image"])
        codes = stage.vqgan.quantizer.codebook.weight.normal_()
        nearest = torch.cdist(features.permute(0, 2, 3, 1).flatten(0, 2), codes).argmin(dim=1)
        quantized = codes[nearest].view(4, 8, 8, -1).permute(0, 3, 1, 2)
        for parameter in stage.vqgan.head.parameters():
            parameter.mul_(20)  # beyond [0, 1]
        expected = stage.vqgan.decode_features(quantized).clamp(0, 1)
    columns = stage.example_grid(batch)
    torch.testing.assert_close(columns["EMA, quantized"], expected)
    assert not torch.equal(columns["EMA, quantized"], columns["EMA"])
    for name in ("raw", "EMA", "EMA, quantized"):
        assert (columns[name].min(), columns[name].max()) == (0, 1)


def test_the_logged_gradient_norms_are_those_of_the_networks(batch: Batch) -> None:
    stage, logged = stage_a(adversarial_start_step=0), {}
    stage.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    fit(stage, batch, 1)
    for name in ("vqgan", "discriminator"):
        grads = [p.grad for p in getattr(stage, name).parameters() if p.grad is not None]
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        torch.testing.assert_close(logged[f"train/grad_norm_{name}"], norm)


def test_codes_are_counted_without_waiting_for_the_device() -> None:
    """``bincount`` reads its largest value on the host; a meta tensor has none to read."""
    indices = torch.randint(7, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(count_codes(indices, 9), indices.flatten().bincount(minlength=9).float())
    assert count_codes(indices.to("meta"), 9).shape == (9,)


def test_codebook_usage_of_given_counts() -> None:
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
    quantized = quantizer(latents)
    flat = latents.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = torch.cdist(flat, quantizer.codebook.weight).argmin(dim=1)
    assert torch.equal(quantized.indices.flatten(), nearest)
    weight = torch.randn_like(quantized.latents)
    (quantized.latents * weight).sum().backward()
    torch.testing.assert_close(latents.grad, weight)


def test_latents_are_scaled_to_unit_variance() -> None:
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
