"""Layouts of the depthwise convolution: is channels-last, in which blocks compute, the faster?"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from scripts.gpu_check.rows import Row, at_most
from scripts.gpu_check.sizes import Check
from scripts.timing import median_seconds
from wuerstchen_pl.distributed.launch import resolve_device

SHAPES = {
    "Stage C": (24, 1536, 24, 24), "Stage B, finest": (8, 320, 128, 128),
    "Stage B, coarsest": (8, 1280, 16, 16),
}  # fmt: skip
"""(B, C, H, W) at the published sizes."""


def rows(check: Check) -> Iterator[Row]:
    """Forward and backward pass of a 3 x 3 depthwise convolution in bfloat16, both layouts."""
    for name, shape in SHAPES.items():
        size = shape if check.size.full else (1, 8, 8, 8)
        times = {
            layout: convolution_seconds(size, layout, check.size.timed_steps)
            for layout in (torch.channels_last, torch.contiguous_format)
        }
        last, first = (duration * 1e6 for duration in times.values())
        yield Row(f"depthwise, {name}", f"channels last {last:.0f} us, first {first:.0f} us")
        what = f"depthwise, {name}: time of channels last relative to first"
        yield at_most(what, last / first, 1.0, "{:.2f}", judged=check.size.full)


def convolution_seconds(
    shape: tuple[int, int, int, int], layout: torch.memory_format, rounds: int
) -> float:
    """Seconds of a forward and backward pass in one layout."""
    device, channels = resolve_device(), shape[1]
    x = torch.randn(shape, device=device, dtype=torch.bfloat16).to(memory_format=layout)
    weight = torch.randn(channels, 1, 3, 3, device=device, dtype=torch.bfloat16)
    x.requires_grad_()
    weight.requires_grad_()

    def forward_and_backward() -> None:
        F.conv2d(x, weight, padding=1, groups=channels).sum().backward()

    return median_seconds(forward_and_backward, rounds)
