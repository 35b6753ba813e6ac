"""The machine: versions, and the rates that bound everything else."""

import os
import platform
from collections.abc import Iterator

import torch

from scripts.gpu_check.rows import Row, at_least
from scripts.gpu_check.sizes import Check
from scripts.timing import hardware, median_seconds
from wuerstchen_pl.callbacks.throughput import peak_tflops
from wuerstchen_pl.distributed.launch import resolve_device
from wuerstchen_pl.io.versions import installed_versions

PACKAGES = ("lightning", "torchvision", "transformers", "diffusers")


def rows(check: Check) -> Iterator[Row]:
    """Versions, the rate of a bfloat16 matrix product, and the rate of a copy."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    versions |= installed_versions(PACKAGES)
    yield Row("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))
    yield Row("CPU cores", str(os.cpu_count()))
    rate, copy = product_rate(check), copy_rate(check)
    peak = peak_tflops(hardware())
    if peak is None:
        yield Row("bfloat16 matrix product", f"{rate / 1e12:.3g} TFLOP/s")
    else:
        name = f"bfloat16 matrix product, of {peak} TFLOP/s"
        yield at_least(name, rate / peak / 1e12, 0.7, "{:.0%}", judged=check.size.full)
    yield Row("copy, bytes read and written", f"{copy / 1e12:.3g} TB/s")


def product_rate(check: Check) -> float:
    """FLOP/s of a square matrix product in bfloat16."""
    side, device = check.size.matrix, resolve_device()
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: a @ b, check.size.timed_steps)


def copy_rate(check: Check) -> float:
    """Bytes per second that a copy on the device reads and writes."""
    source = torch.empty(check.size.copied_bytes, device=resolve_device(), dtype=torch.uint8)
    target = torch.empty_like(source)
    duration = median_seconds(lambda: target.copy_(source), check.size.timed_steps)
    return 2 * source.nbytes / duration
