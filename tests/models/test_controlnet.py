"""ControlNet: nothing at first, then sums at the inputs of blocks, also for cached conditioning."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen_pl.models.activations import checkpoint_activations
from wuerstchen_pl.models.compressor import ConvBackbone, EfficientNet, SemanticCompressor
from wuerstchen_pl.models.conditioning import Residuals
from wuerstchen_pl.models.control_images import Edges
from wuerstchen_pl.models.controlnet import ControlNet, default_blocks
from wuerstchen_pl.models.meta import on_meta
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.wrapping import compile_blocks

DEPTH, WIDTH = 4, 16


def prior() -> Prior:
    torch.manual_seed(0)
    network = Prior(width=WIDTH, depth=DEPTH, num_heads=2, text_dim=8, dropout=0.0)
    with torch.no_grad():
        for parameter in network.parameters():  # some are 0 when they are initialized
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network.eval().requires_grad_(False)


def controlnet(**options: Any) -> ControlNet:
    torch.manual_seed(1)
    arguments = {
        "prior_width": WIDTH,
        "prior_depth": DEPTH,
        "blocks": [0, 2],
        "resize": 1.0,
    } | options
    backbone = arguments.pop("backbone", None) or ConvBackbone(width=4, depth=3)
    return ControlNet(backbone=backbone, control_images=Edges(), **arguments)


def trained(**options: Any) -> ControlNet:
    network = controlnet(**options)
    for projection in network.projections:
        nn.init.normal_(projection[2].weight)  # type: ignore[index]
    return network


def inputs(rows: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(2)
    return (
        torch.randn(rows, 16, 4, 3, generator=rng),
        torch.full((rows,), 0.4),
        torch.randn(rows, 5, 8, generator=rng),
        torch.rand(rows, 3, 32, 24, generator=rng),
    )


@torch.no_grad()
def test_a_new_controlnet_changes_no_bit() -> None:
    network, (xt, t, text, images) = prior(), inputs()
    residuals = controlnet()(images, (4, 3))
    assert torch.equal(network(xt, t, text, residuals), network(xt, t, text))
    cached = network.cache_conditioning(t[:1], text, residuals)
    plain = network.cache_conditioning(t[:1], text)
    assert torch.equal(network.predict_noise(xt, cached), network.predict_noise(xt, plain))


@torch.no_grad()
def test_residuals_are_added_to_the_inputs_of_their_blocks() -> None:
    network, (xt, t, text, images) = prior(), inputs()
    control = trained()
    features = control.features(images, torch.float32)
    expected = network.stem(xt)
    for number, (block, conditioning) in enumerate(
        zip(network.blocks, network.inputs(t, text), strict=True)
    ):
        if number in control.blocks:
            first, last = (
                control.projections[control.blocks.index(number)][i].weight[:, :, 0, 0]  # type: ignore[index]
                for i in (0, 2)
            )
            hidden = F.leaky_relu(torch.einsum("oc,bchw->bohw", first, features), 0.2)
            expected = expected + torch.einsum("oc,bchw->bohw", last, hidden)
        expected = block(expected, conditioning)
    a, b = network.head(network.norm(expected)).chunk(2, dim=1)
    actual = network(xt, t, text, control(images, (4, 3)))
    torch.testing.assert_close(actual, (xt - a) / ((1 - b).abs() + 1e-5), rtol=1e-4, atol=1e-4)
    assert (actual - network(xt, t, text)).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_both_halves_of_guidance_get_the_residuals(rows: int) -> None:
    """One row of residuals is for all images."""
    network, (xt, t, text, images) = prior(), inputs()
    residuals = trained()(images[:rows], (4, 3))
    both = torch.cat([text, text.flip(1)])
    cached = network.cache_conditioning(t[:1], both, residuals)
    halves = network.predict_noise(xt, [c.at_step(0) for c in cached]).chunk(2)
    for actual, condition in zip(halves, both.chunk(2), strict=True):
        expected = network(xt, t, condition, residuals)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    alone = network.predict_noise(xt, [c.at_step(0).first_rows(2) for c in cached])
    torch.testing.assert_close(alone, halves[0], rtol=1e-4, atol=1e-5)
    assert (halves[0] - network(xt, t, text)).abs().max() > 0.1


def gradients(
    network: Prior, control: ControlNet
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    xt, t, text, images = inputs()
    network(xt, t, text, control(images, (4, 3))).square().mean().backward()
    base, beside = (
        {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
        for net in (network, control)
    )
    control.zero_grad()
    return base, beside


def test_gradients_reach_the_controlnet_and_no_base_weight() -> None:
    base, beside = gradients(prior(), trained())
    assert set(base.values()) == {None}
    assert all(grad is not None and grad.abs().max() > 0 for grad in beside.values())
    _, at_first = gradients(prior(), controlnet())
    nonzero = {name for name, grad in at_first.items() if grad is not None and grad.any()}
    assert nonzero == {"projections.0.2.weight", "projections.1.2.weight"}


@pytest.mark.parametrize(
    "wrap", [checkpoint_activations, pytest.param(compile_blocks, marks=pytest.mark.slow)]
)
def test_wrapped_blocks_have_the_same_gradients(wrap: Any) -> None:
    expected = gradients(prior(), trained())[1]
    network = prior()
    wrap(network)
    torch.testing.assert_close(gradients(network, trained())[1], expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_features_of_other_sizes_are_interpolated_between_their_corners() -> None:
    images, control = inputs()[3], trained()
    at_features: Residuals = control(images, (4, 3))
    larger = control(images, (7, 5))
    for block in control.blocks:
        torch.testing.assert_close(larger[block][..., ::2, ::2], at_features[block])


@torch.no_grad()
def test_the_batch_norms_of_the_backbone_keep_their_statistics() -> None:
    """So that an image does not depend on its batch, in training either."""
    control = trained(backbone=EfficientNet(size="s")).train()
    images = inputs()[3]
    before = {name: buffer.clone() for name, buffer in control.named_buffers()}
    together = control(images, (2, 2))
    assert all(torch.equal(before[name], buffer) for name, buffer in control.named_buffers())
    torch.testing.assert_close(together[0][1:], control(images[1:], (2, 2))[0])


def test_the_backbone_can_start_as_that_of_the_compressor() -> None:
    compressor = SemanticCompressor(backbone=ConvBackbone(width=4, depth=3))
    control = controlnet()
    control.copy_backbone(compressor)
    copied = control.backbone.state_dict()
    assert all(torch.equal(copied[k], t) for k, t in compressor.backbone.state_dict().items())
    with pytest.raises(ValueError, match="has other layers than the compressor's"):
        control.copy_backbone(SemanticCompressor(backbone=ConvBackbone(width=4, depth=2)))


def test_v2_gets_residuals_of_24_x_24_positions() -> None:
    with on_meta():
        backbone = EfficientNet(size="s")
        control = ControlNet(
            backbone=backbone, control_images=Edges(), prior_width=1536, prior_depth=32
        ).to("meta")
    images = torch.empty(1, 3, 1024, 1024, device="meta")
    assert control.features(images, torch.float32).shape[2:] == (24, 24)
    residuals = control(images, (24, 24))
    assert {tuple(residual.shape) for residual in residuals.values()} == {(1, 1536, 24, 24)}
    assert sorted(residuals) == [0, 2, 4, 6, 25, 27, 29, 31]
    projections = sum(p.numel() for p in control.parameters()) - sum(
        p.numel() for p in backbone.parameters()
    )
    assert projections == 8 * 1280 * (1280 + 1536)


def test_names_of_weights_are_those_of_stable_cascade() -> None:
    names = {name for name in controlnet().state_dict() if not name.startswith("backbone.")}
    assert names == {f"projections.{i}.{j}.weight" for i in (0, 1) for j in (0, 2)}


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(32, [0, 2, 4, 6, 25, 27, 29, 31]), (16, [0, 2, 13, 15]), (3, [0, 2]), (2, [0, 1]), (1, [0])],
)
def test_default_blocks(depth: int, blocks: list[int]) -> None:
    assert default_blocks(depth) == blocks


@pytest.mark.parametrize("blocks", [[], [4], [-1], [1, 1]])
def test_blocks_that_the_prior_does_not_have_are_refused(blocks: list[int]) -> None:
    with pytest.raises(ValueError, match=r"controlnet\.blocks=.*use different numbers from 0 to 3"):
        controlnet(blocks=blocks)


def test_a_prior_of_other_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="for a prior with 8 blocks of 16 channels, but this one"):
        controlnet(prior_depth=8).check_prior(prior())
    controlnet().check_prior(prior())
