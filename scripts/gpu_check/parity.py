"""The networks compute on the GPU what they compute on the CPU, in float32 and in bfloat16."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from scripts.gpu_check.rows import Row, at_most, equal
from scripts.gpu_check.sizes import Check
from scripts.randomize import randomize
from wuerstchen_pl.distributed.launch import resolve_device
from wuerstchen_pl.models.compressor import EfficientNet, SemanticCompressor
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.vqgan import VQGAN, VectorQuantizer
from wuerstchen_pl.stages.batch_rng import BatchRNG

FLOAT32, BFLOAT16 = 1e-4, 3e-2
"""Largest relative errors of outputs and gradients."""
Results = tuple[Tensor, Tensor]
"""An output, and a gradient."""
Forward = Callable[[nn.Module, list[Tensor]], Tensor]


def rows(check: Check) -> Iterator[Row]:
    """Errors of outputs and gradients; equality of codes and random numbers."""
    exact_float32()
    torch.manual_seed(0)
    for name, (net, inputs, forward) in networks().items():
        yield from compare(name, net, inputs, forward)
    yield from code_rows()
    like = torch.empty(2, 4, 8, 8)
    noise = [
        BatchRNG(seed=0, step=(3, 0), rows=2).noise(like.to(device)).cpu()
        for device in (torch.device("cpu"), resolve_device())
    ]
    yield equal("random numbers are those of the CPU", torch.equal(*noise), True)


def exact_float32() -> None:
    """Compute products of float32 in float32, not in TF32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def networks() -> dict[str, tuple[nn.Module, list[Tensor], Forward]]:
    """Small networks with random weights, their inputs, and how to run them."""
    prior = Prior(width=128, depth=3, num_heads=4, text_dim=64, dropout=0.0)
    diffnext = DiffNeXt(
        widths=[32, 64, 96], num_blocks=[1, 2, 2], num_heads=[None, 4, 4],
        inject_semantic=[False, True, True], cond_dim=64, text_dim=64, dropout=0.0,
    )  # fmt: skip
    vqgan = VQGAN(bottleneck_blocks=2, width=64, codebook_size=256, scale_factor=0.5)
    compressor = SemanticCompressor(backbone=EfficientNet(size="s"))
    for net in (prior, diffnext):
        randomize(net, 1)
        with torch.no_grad():  # predictions divide by a function of the output
            net.head.weight.mul_(0.1)
    randomize(vqgan, 1)
    text, t = torch.randn(3, 77, 64), torch.rand(3)
    semantic = torch.randn(3, 16, 3, 5)
    return {
        "prior": (prior, [torch.randn(3, 16, 12, 10), t, text], run),
        "DiffNeXt": (diffnext, [torch.randn(3, 4, 32, 48), t, semantic, text], run),
        "VQGAN": (vqgan, [torch.rand(2, 3, 64, 96)], autoencode),
        "compressor": (compressor.eval(), [torch.rand(2, 3, 128, 192)], run),
    }


def run(net: nn.Module, inputs: list[Tensor]) -> Tensor:
    """The output of a network."""
    return net(*inputs)


def autoencode(net: nn.Module, inputs: list[Tensor]) -> Tensor:
    """The reconstruction without quantization, whose choice of a code is not continuous."""
    assert isinstance(net, VQGAN)
    return net.decode_features(net.features(*inputs))


def compare(name: str, net: nn.Module, inputs: list[Tensor], forward: Forward) -> Iterator[Row]:
    """Relative errors on the device against float32 on the CPU."""
    device = resolve_device()
    expected = output_and_gradient(copy.deepcopy(net), inputs, forward)
    net, inputs = net.to(device), [x.to(device) for x in inputs]
    for precision, bound in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            actual = output_and_gradient(net, inputs, forward)
        yield from errors(f"{name}, {precision}", actual, expected, bound)


def errors(name: str, actual: Results, expected: Results, bound: float) -> Iterator[Row]:
    """Relative errors of an output and a gradient."""
    for what, a, b in zip(("output", "gradient"), actual, expected, strict=True):
        error = float((a - b).norm() / b.norm())
        yield at_most(f"{name}, error of {what}", error, bound, "{:.1e}")


def output_and_gradient(net: nn.Module, inputs: list[Tensor], forward: Forward) -> Results:
    """The output, and the gradient of its mean square, on the CPU in float32."""
    net.zero_grad()
    output = forward(net, inputs).float()
    output.square().mean().backward()
    gradients = [p.grad.flatten().float().cpu() for p in net.parameters() if p.grad is not None]
    return output.detach().cpu(), torch.cat(gradients)


def code_rows() -> Iterator[Row]:
    """Nearest codes in each precision of matrix products, against float64."""
    device = resolve_device()
    quantizer = VectorQuantizer(8192, 4).to(device)
    nn.init.normal_(quantizer.codebook.weight)
    latents = torch.randn(2, 4, 32, 32, device=device)
    positions = latents.permute(0, 2, 3, 1).flatten(0, 2).double()
    expected = torch.cdist(positions, quantizer.codebook.weight.double()).argmin(dim=1)
    for name, precision, autocast in (
        ("float32", "highest", False), ("TF32", "high", False), ("bfloat16", "high", True),
    ):  # fmt: skip
        torch.set_float32_matmul_precision(precision)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            wrong = int((quantizer.indices(latents).flatten() != expected).sum())
        yield at_most(f"wrong codes of {len(expected)}, {name}", wrong, 1, "{:.0f}")
