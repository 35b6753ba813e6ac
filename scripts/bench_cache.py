"""Time a training step of Stage C from a cache, against diffusers' recipe, which encodes online.

A prior of 8 blocks of width 512, at 24 x 24 positions (images of 1024 px), batch 1. diffusers' step
encodes an image with EfficientNetV2 and a caption with a 12-layer text tower, adds noise and trains
its prior; our step reads latents and text embeddings from cache files and trains our prior.
"""

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from scripts.reference_models import VERSION
from scripts.timing import Work, side_by_side, write_table
from wuerstchen_pl.data.caches.cache_files import EMPTY, PREPROCESSING, ShardWriter, write_manifest
from wuerstchen_pl.data.caches.cached_dataset import CachedDataModule
from wuerstchen_pl.data.sources.source import Sample
from wuerstchen_pl.diffusion.objective import noise_error, p2_weight
from wuerstchen_pl.diffusion.schedule import CosineSchedule, sample_timesteps
from wuerstchen_pl.models.prior import Prior

WIDTH, DEPTH, HEADS, LENGTH = 512, 8, 8, 77
SAMPLES = 64


def online(size: str) -> Work:
    """diffusers' training step: encode, add noise, predict, mean squared error, AdamW."""
    features = getattr(torchvision.models, f"efficientnet_v2_{size}")(weights=None).features
    encoder = nn.Sequential(features, nn.Conv2d(1280, 16, 1), nn.BatchNorm2d(16, affine=False))
    encoder.eval().requires_grad_(False)
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=12,
            num_attention_heads=HEADS,
        )
    ).eval().requires_grad_(False)  # fmt: skip
    prior = WuerstchenPrior(c_in=16, c=WIDTH, c_cond=WIDTH, c_r=64, depth=DEPTH, nhead=HEADS)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-6)
    scheduler: Any = DDPMWuerstchenScheduler()
    image = torch.randn(1, 3, 768, 768)
    ids = torch.randint(0, 49000, (1, LENGTH))

    def step() -> None:
        with torch.no_grad():
            x0 = (encoder(image) + 1) / 42
            embeds = text(ids).last_hidden_state
        t, noise = torch.rand(1), torch.randn_like(x0)
        pred = prior(scheduler.add_noise(x0, noise, t), t, embeds)
        loss = F.mse_loss(pred.float(), noise.float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()

    return step


def write_cache(root: Path) -> None:
    """Write random latents and text embeddings as ``python -m wuerstchen_pl.cache`` does."""
    writer = ShardWriter(root / "train-00000-000.safetensors")
    for i in range(SAMPLES):
        sample = Sample(f"{i}", ("a caption",), 1024, 1024, "s")
        latents = {"semantic": torch.randn(1, 16, 24, 24).bfloat16()}
        writer.add(sample, (1024, 1024), latents, torch.randn(1, LENGTH, WIDTH).bfloat16())
    writer.write()
    save_file({"text": torch.randn(1, LENGTH, WIDTH)}, root / EMPTY)
    write_manifest(
        root, [("train-00000-000.safetensors", "train")], preprocessing=PREPROCESSING,
        tensors=["semantic"], sizes=[[1024, 1024]], crops=1, text=True, made_with={},
    )  # fmt: skip


def cached(root: Path) -> Work:
    """Our training step: read a batch, add noise, predict, weighted error, AdamW."""
    module = CachedDataModule(root=str(root), batch_size=1)
    module.prepare_data()
    module.setup()
    loader = module.train_dataloader()

    def endless() -> Iterator[dict]:
        while True:
            for batch in loader:
                yield module.on_after_batch_transfer(batch, 0)

    batches = endless()
    prior = Prior(
        latent_channels=16, width=WIDTH, depth=DEPTH, num_heads=HEADS, text_dim=WIDTH
    ).train()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-6, fused=True)
    schedule = CosineSchedule()

    def step() -> None:
        batch = next(batches)
        x0 = (batch["semantic"] + 1) / 42
        t, noise = sample_timesteps(torch.rand(1)), torch.randn_like(x0)
        pred = prior(schedule.add_noise(x0, t, noise), t, batch["text"])
        loss = (p2_weight(schedule, t, "code") * noise_error(pred, noise)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()

    return step


def run(rounds: int) -> Path:
    """Run the benchmark and write its table; returns the path."""
    warnings.filterwarnings("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        write_cache(Path(name))
        from_cache = cached(Path(name))
        for size in ("s", "l"):
            timing = side_by_side(online(size), from_cache, rounds)
            rows.append(
                f"| EfficientNetV2-{size.upper()} | {timing.reference_ms:.0f} "
                f"| {timing.package_ms:.0f} | {timing.ratio:.2f} |"
            )
            print(rows[-1], flush=True)
    return write_table(
        "training_from_cache",
        "python scripts/bench.py cache --threads 1",
        f"Milliseconds per step of Stage C: {DEPTH} blocks of width {WIDTH}, 24 x 24 positions, "
        f"batch 1, float32, 12-layer text tower; diffusers {VERSION} encodes online. Medians of "
        f"{rounds} alternating rounds.",
        "| compressor | diffusers, online | ours, cached | ratio |",
        rows,
    )
