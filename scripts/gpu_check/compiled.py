"""Compiled for training, the denoisers have the outputs and gradients that they have otherwise."""

import copy
from collections.abc import Iterator

import torch

from scripts.gpu_check.parity import (
    FLOAT32,
    errors,
    exact_float32,
    networks,
    output_and_gradient,
)
from scripts.gpu_check.rows import Row
from scripts.gpu_check.sizes import Check
from wuerstchen_pl.distributed.launch import resolve_device
from wuerstchen_pl.models.wrapping import compile_blocks


def rows(check: Check) -> Iterator[Row]:
    """Relative errors of compiled blocks against uncompiled ones on the device, in float32."""
    exact_float32()
    torch.manual_seed(0)
    device = resolve_device()
    for name in ("prior", "DiffNeXt"):
        net, inputs, forward = networks()[name]
        net, inputs = net.to(device), [x.to(device) for x in inputs]
        compiled = copy.deepcopy(net)
        compile_blocks(compiled)
        expected = output_and_gradient(net, inputs, forward)
        actual = output_and_gradient(compiled, inputs, forward)
        yield from errors(f"{name}, compiled", actual, expected, FLOAT32)
