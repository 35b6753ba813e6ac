"""Time a training step of each stage's network: forward, backward and AdamW on random latents."""

from pathlib import Path

import hydra
import torch
from torch import nn

from scripts.timing import Work, median_seconds, write_table
from wuerstchen_pl.cli.config import conf_dir


def stage_step(stage: str, preset: str, batch: int, device: torch.device) -> tuple[nn.Module, Work]:
    """The network that a stage trains, and a callable that computes its loss."""
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


def measure(net: nn.Module, step: Work, device: torch.device, *, bf16: bool) -> float:
    """Seconds per training step: the median of seven, after two warm-up steps."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return median_seconds(train, 7)


def run(preset: str, batch: int) -> Path:
    """Run the benchmark and write its table; returns the path."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for stage in "abc":
        for bf16 in (False, True):
            net, step = stage_step(stage, preset, batch, device)
            duration = measure(net, step, device, bf16=bf16)
            count = sum(p.numel() for p in net.parameters())
            row = f"| {stage} | {count:,} | {'bf16-mixed' if bf16 else '32-true'} "
            rows.append(row + f"| {duration * 1000:.1f} | {batch / duration:.1f} |")
            print(rows[-1], flush=True)
    return write_table(
        f"training_step_{preset}",
        f"python scripts/bench.py training --preset {preset} --batch {batch}",
        "Without data loading and frozen networks; images of 64 px for the tiny preset, else "
        "512 px.",
        "| stage | parameters | precision | ms | samples/s |",
        rows,
    )
