"""Stage C with a ControlNet: nothing changes at first, and the base never does."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.stages.conftest import fit, stage_b, training
from wuerstchen_pl.adapters.adapter import Adapter
from wuerstchen_pl.io.atomic import Source
from wuerstchen_pl.models.activations import checkpoint_activations
from wuerstchen_pl.models.compressor import ConvBackbone
from wuerstchen_pl.models.control_images import (
    GRAY,
    ControlImages,
    Edges,
    Files,
    LowResolution,
    Masked,
)
from wuerstchen_pl.models.controlnet import ControlNet
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.sampling.control import Control
from wuerstchen_pl.stages.batch_rng import BatchRNG
from wuerstchen_pl.stages.c import StageC
from wuerstchen_pl.stages.controlnet import ControlNetStage
from wuerstchen_pl.stages.stage import Batch

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start")
SOURCE = Source(path="base", sha256="0" * 64)


def networks() -> dict[str, Any]:
    """The arguments of a Stage C that was trained: its prior predicts something."""
    torch.manual_seed(0)
    text = TextEncoder(width=16, depth=1, num_heads=2, context_length=8)
    prior = Prior(width=32, depth=3, num_heads=2, text_dim=16, dropout=0.1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    text.source = prior.source = SOURCE
    return {"stage_b": stage_b(), "prior": prior, "text_encoder": text}


def controlnet(control_images: ControlImages | None = None) -> ControlNet:
    torch.manual_seed(3)
    return ControlNet(
        backbone=ConvBackbone(width=4, depth=3), control_images=control_images or Edges(),
        prior_width=32, prior_depth=3, resize=0.75,
    )  # fmt: skip


def controlled(
    control_images: ControlImages | None = None, base: dict[str, Any] | None = None, **options: Any
) -> ControlNetStage:
    arguments: Any = {**(base or networks()), **training(1e-2), **options}
    return ControlNetStage(controlnet=controlnet(control_images), **arguments)


def test_the_loss_of_a_new_controlnet_is_that_of_the_base(batch: Batch) -> None:
    plain, stage = StageC(**networks()).eval(), controlled()
    for mode in (True, False):
        stage.train(mode)
        stage.prior.eval()
        for one, other in zip(
            plain.validation_losses(batch), stage.validation_losses(batch), strict=True
        ):
            assert torch.equal(one, other)
    options: dict[str, Any] = {"size": (32, 32), "seeds": range(4), "num_steps": 3}
    stage.eval()
    control = stage.control(batch)
    sampled = stage.sample(batch["caption"], control=control, **options)
    assert torch.equal(sampled, plain.sample(batch["caption"], **options))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_changes_the_controlnet_and_no_bit_of_the_base(
    checkpointing: bool, batch: Batch
) -> None:
    stage = controlled()
    if checkpointing:
        checkpoint_activations(stage)
    before = {name: p.clone() for name, p in stage.named_parameters()}
    fit(stage, batch, 3)
    changed = {name for name, p in stage.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"controlnet.{name}" for name, _ in stage.controlnet.named_parameters()}
    assert not any(part.training for part in stage.prior.modules())
    assert stage.state_dict().keys() == {f"controlnet.{k}" for k in stage.controlnet.state_dict()}
    assert stage.ema.shadow.keys() == changed
    copy = controlled()
    copy.load_state_dict(stage.state_dict())
    assert torch.equal(copy.validation_losses(batch)[1], stage.validation_losses(batch)[1])


def test_activation_checkpointing_changes_no_gradient(batch: Batch) -> None:
    weights = []
    for checkpointing in (False, True):
        stage = controlled()
        if checkpointing:
            checkpoint_activations(stage)
        fit(stage, batch, 2)
        weights.append(stage.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_backbone_starts_as_the_compressors() -> None:
    stage = controlled()
    compressor = stage.stage_b.compressor.backbone.state_dict()
    backbone = stage.controlnet.backbone.state_dict()
    assert all(torch.equal(backbone[key], compressor[key]) for key in compressor)
    fresh = controlnet().backbone.state_dict()
    assert any(not torch.equal(fresh[key], compressor[key]) for key in compressor)


def rng(rows: int, first_row: int = 0) -> BatchRNG:
    return BatchRNG(seed=1, step=(2, 0), rows=rows, first_row=first_row)


def images_of(stage: ControlNetStage, batch: Batch, rng: BatchRNG | None = None) -> Tensor:
    images = stage.control(batch, rng).images
    assert images is not None
    return images


def test_random_masks_are_functions_of_step_and_row_or_of_the_key(batch: Batch) -> None:
    stage = controlled(Masked())
    halves: list[Any] = [
        {key: value[rows] for key, value in batch.items()}  # type: ignore[index]
        for rows in (slice(2), slice(2, 4))
    ]
    whole = images_of(stage, batch, rng(4))
    two = [images_of(stage, half, rng(2, 2 * i)) for i, half in enumerate(halves)]
    assert torch.equal(whole, torch.cat(two))
    in_validation = images_of(stage, batch)
    assert torch.equal(in_validation, torch.cat([images_of(stage, half) for half in halves]))
    assert not torch.equal(in_validation, whole)
    assert ((whole == GRAY).flatten(1).any(dim=1)).all()


@pytest.mark.parametrize("kind", [Edges(), LowResolution(), Masked(), Files()])
def test_control_images_come_from_the_batch(kind: ControlImages, batch: Batch) -> None:
    stage = controlled(kind)
    batch = {**batch, "control": 1 - batch["image"]}
    images = images_of(stage, batch, rng(4))
    if isinstance(kind, Files):
        assert torch.equal(images, batch["control"])
    elif not isinstance(kind, Masked):
        assert torch.equal(images, kind(batch["image"]))
    assert list(stage.example_grid(batch))[:2] == ["control", "original"]
    lacking: Any = {key: value for key, value in batch.items() if key not in ("control", "image")}
    with pytest.raises(ValueError, match=r"a batch has no '(image|control)', which the ControlNet"):
        stage.control(lacking)


def test_sampling_computes_the_residuals_once_for_both_halves(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = controlled().eval()
    fit(stage, batch, 3)
    stage.eval()
    calls: list[Tensor] = []
    forward = ControlNet.forward

    def counting_forward(self: ControlNet, images: Tensor, size: tuple[int, int]) -> Any:
        calls.append(images)
        return forward(self, images, size)

    monkeypatch.setattr(ControlNet, "forward", counting_forward)
    control = stage.control(batch)
    options: dict[str, Any] = {"size": (32, 32), "num_steps": 3, "guidance_scale": 4.0}
    together = stage.sample(batch["caption"], seeds=range(4), control=control, **options)
    assert len(calls) == 1
    one = Control(images_of(stage, batch)[2:3])
    alone = stage.sample(batch["caption"][2:3], seeds=[2], control=one, **options)
    torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-4)
    same = stage.sample(batch["caption"], seeds=range(4), control=one, **options)
    torch.testing.assert_close(same[2], together[2], rtol=1e-4, atol=1e-4)
    assert (same[0] - together[0]).abs().max() > 1e-3


def test_a_scale_of_zero_is_the_base_and_half_is_between(batch: Batch) -> None:
    stage = controlled().eval()
    fit(stage, batch, 3)
    stage.eval()
    options: dict[str, Any] = {"size": (32, 32), "seeds": range(4), "num_steps": 2}
    images = images_of(stage, batch)
    base, half, full = (
        stage.sample(batch["caption"], control=Control(images, scale), **options)
        for scale in (0.0, 0.5, 1.0)
    )
    plain = StageC(**networks()).eval().sample(batch["caption"], **options)
    assert torch.equal(base, plain)
    assert torch.equal(base, stage.sample(batch["caption"], control=Control(None, 0.0), **options))
    assert 0 < (half - base).norm() < (full - base).norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": Adapter()}, "a ControlNet is trained alone"),
        ({"train_text_encoder": True}, "a ControlNet is trained alone"),
    ],
)
def test_nothing_else_is_trained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        controlled(**options)


def test_a_base_without_source_is_refused() -> None:
    base = networks()
    base["prior"].source = None
    with pytest.raises(ValueError, match="needs the weights of a base model; set preset=base"):
        controlled(base=base)


@pytest.mark.slow
def test_the_right_control_image_lowers_the_loss(batch: Batch) -> None:
    """The captions are all empty, so that only the control images tell the images apart."""
    base = networks()
    compressor = base["stage_b"].compressor.train()
    for _ in range(50):  # latents of unit variance, which differ between images
        compressor(batch["image"])
    pretrained = StageC(**base, **training(3e-3), caption_drop_prob=1.0)
    fit(pretrained, batch, 150)
    prior = base["prior"].eval()
    stage = controlled(
        LowResolution(factor=2), base={**base, "prior": prior}, caption_drop_prob=1.0
    )
    empty: Batch = {**batch, "caption": [""] * 4, "key": [f"{i}" for i in range(4)]}

    def loss(images: Tensor) -> float:
        stage.control = lambda *_: Control(images)  # type: ignore[method-assign, assignment]
        try:
            return float(stage.eval().validation_losses(empty)[1].mean())
        finally:
            del stage.control

    images = images_of(stage, empty)
    before = loss(images)
    fit(stage, empty, 150)
    right, shuffled = loss(images), loss(images.roll(1, dims=0))
    assert right < 0.8 * before
    assert right < 0.8 * shuffled
