"""Time a training step of each stage's network: ``make bench``.

Forward, backward and AdamW on random latents of the preset's size; no data and no frozen parts. The
table is printed and written to ``benchmarks/``, named by hardware and month.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import hydra
import torch
from torch import Tensor, nn

from wuerstchen_pl.cli import conf_dir

Step = Callable[[], Tensor]


def stage_step(stage: str, preset: str, batch: int, device: torch.device) -> tuple[nn.Module, Step]:
    """A stage's trained network, and one forward pass to a loss."""
    overrides = [f"stage={stage}", f"preset={preset}"]
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = hydra.compose("train", overrides)
    part = {"a": "vqgan", "b": "diffnext", "c": "prior"}[stage]
    with device:
        net = hydra.utils.instantiate(cfg.stage[part], _convert_="all").train()
        side = 64 if preset == "tiny" else 512
        semantic = torch.randn(batch, 16, *[4 if preset == "tiny" else 12] * 2)
        t, images = torch.rand(batch), torch.rand(batch, 3, side, side)
        latents = torch.randn(batch, 4, side // 4, side // 4)
        text_dim = getattr(net, "text_dim", None)
        text = torch.randn(batch, 77, text_dim) if text_dim else None
    if stage == "a":
        return net, lambda: (net.decode_features(net.features(images)) - images).square().mean()
    if stage == "b":
        return net, lambda: net(latents, t, semantic, text).square().mean()
    return net, lambda: net(semantic, t, text).square().mean()


def measure(net: nn.Module, step: Step, device: torch.device, *, bf16: bool) -> float:
    """Seconds of a training step, the median of seven after two to warm up."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", default="v2" if cuda else "tiny")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    hardware = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    lines = [
        f"# Training step, preset {options.preset}",
        "",
        f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{date.today()}.",
        f"`python -m scripts.bench --preset {options.preset} --batch {options.batch}`",
        "",
        "| stage | parameters | precision | ms | samples/s |",
        "|---|---|---|---|---|",
    ]
    for stage in "abc":
        for bf16 in (False, True):
            net, step = stage_step(stage, options.preset, options.batch, device)
            seconds = measure(net, step, device, bf16=bf16)
            count = sum(p.numel() for p in net.parameters())
            row = f"| {stage} | {count:,} | {'bf16-mixed' if bf16 else '32-true'} "
            lines.append(row + f"| {seconds * 1000:.1f} | {options.batch / seconds:.1f} |")
            print(lines[-1], flush=True)
    slug = "_".join(hardware.lower().replace("(r)", "").split())
    path = Path("benchmarks") / f"train_step_{slug}_{date.today():%Y%m}_{options.preset}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(path)


if __name__ == "__main__":
    main()
