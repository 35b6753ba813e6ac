"""Outputs of our networks and noise process against those of the authors' code."""

import re

import pytest
import torch
from torch import Tensor

from tests.golden_files import golden, load
from wuerstchen_pl.diffusion.objective import p2_weight
from wuerstchen_pl.diffusion.sampler import ddim_step, ddpm_step
from wuerstchen_pl.diffusion.schedule import CosineSchedule
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.models.discriminator import Discriminator
from wuerstchen_pl.models.grn import GeluGRN
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.vqgan import VQGAN


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def prior() -> tuple[Prior, dict[str, Tensor]]:
    c, weights, io = golden("stage_c_prior")
    net = Prior(
        latent_channels=c["c_in"], width=c["c"], depth=c["depth"], num_heads=c["nhead"],
        text_dim=c["c_cond"], time_dim=c["c_r"],
    )  # fmt: skip
    load(net, {}, weights)
    return net, io


@torch.no_grad()
def test_prior_equals_the_published_one(prior: tuple[Prior, dict[str, Tensor]]) -> None:
    net, io = prior
    close(net(io["x"], io["r"], io["c"]), io["out"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_response_norm_in_half_precision(dtype: torch.dtype, scale: float) -> None:
    norm = GeluGRN(8)
    rng = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng))
    u = torch.randn(2, 4, 4, 8, generator=rng) * scale
    x = torch.nn.functional.gelu(u.to(dtype).double())
    energy = x.double().square().sum((1, 2), keepdim=True).sqrt()
    response = energy / (energy.mean(-1, keepdim=True) + 1e-6)
    expected = norm.gamma * x * response + norm.beta + x  # the paper's formula in float64
    actual = norm.to(dtype)(u.to(dtype))
    assert float((actual - expected).abs().max()) < 3e-2 * float(expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("changed", ["r", "c", "x"])
def test_prior_reads_every_input(prior: tuple[Prior, dict[str, Tensor]], changed: str) -> None:
    net, io = prior
    inputs = {k: io[k] * (0.5 if k == changed else 1) for k in ("x", "r", "c")}
    assert (net(*inputs.values()) - io["out"]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def diffnext() -> tuple[DiffNeXt, dict[str, Tensor]]:
    c, weights, io = golden("stage_b_diffnext")
    shape = {
        "num_blocks": c["blocks"], "num_heads": [n if n > 0 else None for n in c["nhead"]],
    }  # fmt: skip
    net = DiffNeXt(
        latent_channels=c["c_in"], semantic_channels=c["effnet_embd"],
        patch_size=c["patch_size"], widths=c["c_hidden"],
        inject_semantic=c["inject_effnet"], cond_dim=c["c_cond"], text_dim=c["clip_embd"],
        time_dim=c["c_r"], **shape,
    )  # fmt: skip
    load(net, shape, weights)
    return net, io


@torch.no_grad()
def test_diffnext_equals_the_published_one(diffnext: tuple[DiffNeXt, dict[str, Tensor]]) -> None:
    net, io = diffnext
    size = (io["x"].shape[-2], io["x"].shape[-1])
    a, b = net.heads(io["x"], net.inputs(io["r"], io["effnet"], io["clip"], size))
    close(a, io["a"])
    close(b, io["b"])
    close(net(io["x"], io["r"], io["effnet"], io["clip"]), io["out"])


@torch.no_grad()
@pytest.mark.parametrize("changed", ["x", "r", "effnet", "clip"])
def test_diffnext_reads_every_input(
    diffnext: tuple[DiffNeXt, dict[str, Tensor]], changed: str
) -> None:
    net, io = diffnext
    inputs = {k: io[k] * (0.5 if k == changed else 1) for k in ("x", "r", "effnet", "clip")}
    assert (net(*inputs.values()) - io["out"]).abs().max() > 1e-3


@torch.no_grad()
def test_vqgan_equals_the_published_one() -> None:
    c, weights, io = golden("stage_a_vqgan")
    net = VQGAN(
        levels=c["levels"], bottleneck_blocks=c["bottleneck_blocks"], width=c["c_hidden"],
        latent_channels=c["c_latent"], codebook_size=c["codebook_size"],
        scale_factor=c["scale_factor"],
    )  # fmt: skip
    load(net, {"levels": c["levels"], "bottleneck_blocks": c["bottleneck_blocks"]}, weights)
    close(net.encode(io["x"]), io["latents"])
    quantized = net.quantizer(net.features(io["x"]))
    assert torch.equal(quantized.indices, io["indices"])
    close(quantized.latents / net.scale_factor, io["quantized"])
    loss = quantized.codebook_loss + 0.25 * quantized.commitment_loss
    close(loss.flatten(), io["vq_plus_quarter_commit_loss"])
    close(net.decode(io["latents"]), io["decoded_latents"])
    close(net.decode_features(net.quantizer.lookup(io["indices"])), io["decoded_indices"])


@torch.no_grad()
def test_discriminator_equals_the_published_one() -> None:
    c, weights, io = golden("stage_a_discriminator")
    net = Discriminator(width=c["c_hidden"], depth=c["depth"])
    for pattern, name in (  # torch's old spectral norm -> its new one
        (r"\.weight_orig$", ".parametrizations.weight.original"),
        (r"\.weight_u$", ".parametrizations.weight.0._u"),
        (r"\.weight_v$", ".parametrizations.weight.0._v"),
        (r"^shuffle\.", "head."),
    ):
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    net.load_state_dict(weights)
    close(net.eval()(io["x"]), io["out"])


def test_noise_process_equals_the_published_one() -> None:
    _, _, io = golden("diffusion")
    schedule = CosineSchedule()
    close(schedule.alpha_bar(io["t"]), io["alpha_cumprod"])
    close(schedule.add_noise(io["x0"], io["t"], io["noise"]), io["noised"])
    close(p2_weight(schedule, io["t"], "code"), io["p2_weight_k1_gamma1"])


def test_sampler_steps_equal_the_published_ones() -> None:
    _, _, io = golden("diffusion")
    step = (CosineSchedule(), io["noised"], io["step_from"], io["step_to"], io["step_eps"])
    close(ddpm_step(*step, io["ddpm_step_noise"]), io["ddpm_step"])
    close(ddim_step(*step), io["ddim_step"])
