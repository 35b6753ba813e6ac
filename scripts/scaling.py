"""Estimate the cost of the paper's recipes: ``python -m scripts.scaling`` writes docs/scaling.md.

FLOPs are counted on the meta device, with the networks of the composed recipes; nothing is timed.
Hours follow from an assumed model FLOPs utilization (MFU), and are compared with the MFU that the
paper's published hours imply.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
import torchvision
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scripts.activation_memory import SavedBytes, saved_bytes
from wuerstchen_pl.cli.config import conf_dir
from wuerstchen_pl.data.ordering.buckets import Buckets
from wuerstchen_pl.models.meta import on_meta

RECIPES = (
    "paper_a", "paper_b_512", "paper_b_1024", "paper_c_1", "paper_c_2", "paper_c_3", "paper_c_4",
)  # fmt: skip
PUBLISHED_HOURS = {"b": 11_000, "c": 24_602}  # arXiv 2306.00637
PEAK = 312e12  # FLOP/s of an A100, dense bfloat16
BYTES = 4 + 4 + 4 + 8  # per trainable weight: weight, gradient, EMA weight, optimizer state


class RecipeCost(NamedTuple):
    """Compute and size of one recipe."""

    name: str
    stage: str
    steps: int
    batch: int
    flops: float  # per sample, forward and backward
    weights: int  # trainable
    batch_per_gpu: int
    saved: SavedBytes  # of a sample of the largest bucket

    @property
    def samples(self) -> int:
        """Number of training samples."""
        return self.steps * self.batch

    def fits(self, saved: float) -> int:
        """The largest batch on each of 8 GPUs of 80 GB, with 10 % to spare."""
        return int((0.9 * 80e9 - BYTES * self.weights / 8) / saved)

    def hours(self, mfu: float) -> float:
        """A100 hours."""
        return self.samples * self.flops / (PEAK * mfu) / 3600


def recipe_cost(name: str) -> RecipeCost:
    """Count the FLOPs, weights and activations of a recipe."""
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = hydra.compose("train", [f"experiment={name}", "data.urls=x"])
        stage = name.split("_")[1]
        lower = {s: hydra.compose("train", [f"stage={s}", "preset=paper"]).stage for s in "ab"}
    sizes = bucket_sizes(cfg)
    with on_meta():
        flops = [sample_flops(stage, cfg, lower, *size) for size in sizes]
        trained = trained_networks(cfg, stage)
    weights = sum(p.numel() for net in trained for p in net.parameters())
    mean_flops = sum(flops) / len(flops)
    largest = max(sizes, key=lambda size: size[0] * size[1])
    saved = saved_bytes(lambda: training_forward(stage, cfg, lower, *largest))
    return RecipeCost(
        *(name, stage, cfg.trainer.max_steps, cfg.global_batch, mean_flops, weights),
        batch_per_gpu=cfg.data.batch_size,
        saved=saved,
    )


def bucket_sizes(cfg: DictConfig) -> list[tuple[int, int]]:
    """The (height, width) of a recipe's batches."""
    data = cfg.data
    ratios = list(data.ratios) if data.ratios else None
    buckets = Buckets(
        policy=data.buckets, image_size=data.image_size, multiple=data.bucket_multiple,
        ratios=ratios,
    )  # fmt: skip
    return list(buckets.sizes)


def trained_networks(cfg: DictConfig, stage: str) -> list[nn.Module]:
    """The networks that a stage trains."""
    parts = {"a": ["vqgan", "discriminator"], "b": ["diffnext", "compressor"], "c": ["prior"]}
    return [_network(cfg.stage[part]) for part in parts[stage]]


def _network(node: Any) -> nn.Module:
    node = {**node}
    if "backbone" in node and "weights" in node["backbone"]:
        node["backbone"] = {**node["backbone"], "weights": None}
    return hydra.utils.instantiate(node, _convert_="all")


def sample_flops(
    stage: str, cfg: DictConfig, lower: dict[str, DictConfig], height: int, width: int
) -> float:
    """FLOPs of a training step per sample, including frozen networks; call on the meta device.

    A backward pass counts as two forward passes. ``lower`` has the configs of Stages A and B.
    """
    images = torch.rand(2, 3, height, width)
    if stage == "a":
        vqgan, discriminator = trained_networks(cfg, stage)
        features = torchvision.models.vgg16().features
        autoencode = count_flops(lambda: vqgan.decode_features(vqgan.features(images)))  # type: ignore[operator]
        # 8: 3 each for real and generated images in its own step, 2 in the VQGAN's step
        adversarial = count_flops(lambda: discriminator(images))
        return 3 * autoencode + 8 * adversarial + 3 * count_flops(lambda: features(images))
    compressor = _network((cfg.stage if stage == "b" else lower["b"]).compressor)
    h, w = compressor.latent_size(height, width)  # type: ignore[operator]
    t, semantic = torch.rand(2), torch.rand(2, 16, h, w)
    encoding = count_flops(lambda: compressor(images))
    if stage == "c":
        prior = _network(cfg.stage.prior)
        text = torch.rand(2, 77, cfg.stage.text_encoder.width)
        return 3 * count_flops(lambda: prior(semantic, t, text)) + encoding + text_flops(cfg)
    diffnext, vqgan = _network(cfg.stage.diffnext), _network(lower["a"].vqgan)
    latents = torch.rand(2, 4, height // 4, width // 4)
    forward = count_flops(lambda: diffnext(latents, t, semantic, None)) + encoding
    return 3 * forward + count_flops(lambda: vqgan.encode(images))  # type: ignore[operator]


def training_forward(
    stage: str, cfg: DictConfig, lower: dict[str, DictConfig], height: int, width: int
) -> tuple[list[nn.Module], Callable[[int], Any]]:
    """The networks that gradients pass through, and their forward pass for a batch size."""
    networks = trained_networks(cfg, stage)
    compressor: Any = networks[1] if stage == "b" else _network(lower["b"].compressor)
    if stage == "a":
        vqgan, discriminator = networks
        perceptual = torchvision.models.vgg16().features.requires_grad_(False)

        def adversarial(batch: int) -> Any:
            decode: Any = vqgan.decode_features
            images = decode(vqgan.features(torch.rand(batch, 3, height, width)))  # type: ignore[operator]
            return discriminator(images), perceptual(images)

        return [*networks, perceptual], adversarial
    if stage == "c":
        sides = (16, *compressor.latent_size(height, width))
        text = (77, cfg.stage.text_encoder.width)
        return networks, lambda n: networks[0](
            torch.rand(n, *sides), torch.rand(n), torch.rand(n, *text)
        )
    return networks, lambda n: networks[0](
        torch.rand(n, 4, height // 4, width // 4),
        torch.rand(n),
        compressor(torch.rand(n, 3, height, width)),
        None,
    )


def text_flops(cfg: DictConfig) -> float:
    """FLOPs of a caption in a CLIP text tower: 2 per weight and token, plus attention."""
    text, tokens = cfg.stage.text_encoder, 77
    return text.depth * (2 * 12 * text.width**2 * tokens + 4 * tokens**2 * text.width)


def count_flops(forward: Callable[[], Tensor]) -> float:
    """FLOPs per sample of a forward pass of two samples."""
    with FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops() / 2


def page(mfu: float, image_kb: float) -> str:
    """The text of docs/scaling.md."""
    costs = [recipe_cost(name) for name in RECIPES]
    lines = [
        "# Cost of the paper's recipes", "",
        f"Written by `python -m scripts.scaling --mfu {mfu:g} --image-kb {image_kb:g}`. FLOPs and "
        "weights are",
        "counted on the networks of `preset=paper`; nothing was timed. A100 hours assume 312",
        f"TFLOP/s (bfloat16) and a model FLOPs utilization (MFU) of {mfu:.0%}.", "",
        "| recipe | samples | TFLOP per sample | A100 hours | days on 8 GPUs | 64 | 256 |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for cost in costs:
        hours = cost.hours(mfu)
        days = " | ".join(f"{hours / gpus / 24:.1f}" for gpus in (8, 64, 256))
        lines.append(
            f"| {cost.name} | {cost.samples / 1e6:.0f} M | {cost.flops / 1e12:.3f} | {hours:,.0f} "
            f"| {days} |"
        )
    lines += [
        "",
        "| stage | estimated A100 hours | published | MFU implied by the published hours |",
    ]
    lines += ["|---|---|---|---|"]
    for stage, published in PUBLISHED_HOURS.items():
        hours = sum(cost.hours(mfu) for cost in costs if cost.stage == stage)
        implied = hours * mfu / published
        lines.append(f"| {stage.upper()} | {hours:,.0f} | {published:,} | {implied:.0%} |")
    lines += [
        "", "Weights, gradients, EMA weights and optimizer state take 20 bytes per weight, sharded",
        "over the GPUs with `trainer=fsdp`; a checkpoint takes 16. Activations are extra: a run",
        "measures them before its first step. Per step, each GPU communicates 12 bytes per weight",
        "with FSDP and 8 with DDP.", "",
        "| stage | weights | GB per GPU on 1 | 8 | 64 | 256 | checkpoint GB | GB per step, FSDP "
        "| DDP |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for cost in (costs[0], costs[1], costs[3]):
        state = " | ".join(f"{BYTES * cost.weights / gpus / 1e9:.2f}" for gpus in (1, 8, 64, 256))
        lines.append(
            f"| {cost.stage.upper()} | {cost.weights / 1e6:,.0f} M | {state} "
            + "".join(f"| {size * cost.weights / 1e9:.1f} " for size in (16, 12, 8))
            + "|"
        )
    lines += [
        "",
        "Activations in bfloat16 autocast with flash attention, counted on tensors without data",
        "for a sample of the largest bucket, and the largest batch on each of 8 GPUs of 80 GB with",
        "`trainer=fsdp_a100`, with 10 % to spare; frozen networks, up to 2 GB, are not included.",
        "`activation_checkpointing=auto` switches checkpointing on if a batch needs it. Batches of",
        "the recipes divide the global batch on up to 64 GPUs (`paper_a` 8, `paper_b_1024` 16); on",
        "fewer GPUs, use a larger divisor that fits.",
        "",
        "| recipe | MB per sample | with checkpointing | largest batch | with checkpointing "
        "| batch of the recipe |",
        "|---|---|---|---|---|---|",
    ]
    for cost in costs:
        columns = [f"{saved / 1e6:,.0f}" for saved in cost.saved]
        columns += [f"{cost.fits(saved):,}" for saved in cost.saved]
        lines.append(f"| {cost.name} | {' | '.join(columns)} | {cost.batch_per_gpu} |")
    lines += [
        "", f"With images of {image_kb:g} KB, also an assumption, 103 M images are "
        f"{103e6 * image_kb / 1e9:,.0f} TB, read at these rates:", "",
        "| recipe | images/s on 8 GPUs | 64 | 256 | MB/s on 256 | decoding cores per GPU |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for cost in costs:
        rate = PEAK * mfu / cost.flops
        rates = " | ".join(f"{rate * gpus:,.0f}" for gpus in (8, 64, 256))
        lines.append(
            f"| {cost.name} | {rates} | {rate * 256 * image_kb / 1e3:,.0f} "
            f"| {rate / CORE_RATE:.1f} |"
        )
    return "\n".join([*lines, "", CLOSING])


CORE_RATE = 126.2
"""Images per second per core, 1024 px JPEGs to 512 px; benchmarks/, AMD EPYC, 2026-11-21."""
CLOSING = f"""Decoding cores assume {CORE_RATE} images per second per core, measured from 1024
px JPEGs to 512 px batches (`benchmarks/`, AMD EPYC, 2026-11-21). Larger images decode more slowly.

## What would limit a run on a billion images first

1. **Image decoding in the first phases.** Stage A's steps are so cheap that decoding limits them:
   use more cores, or smaller images in the shards. `speed/data_wait` shows when this happens.
2. **Downloads.** All processes follow one global order and take their part of each batch, so each
   machine downloads every shard that its processes read. For a billion images, put the shards on a
   shared file system, or build the cache once (`python -m wuerstchen_pl.cache`: 18 KB per image at
   24 x 24).
3. **Memory that grows with the dataset.** The names of all shards are in memory: 100,000 of them
   at 10,000 images per shard. Samples are listed for one window at a time. `deduplicate` takes 120
   bytes per image; run it in `data build` instead.
4. **Checkpoints.** With `ddp` one process writes and hashes the whole checkpoint; with `fsdp` all
   processes write, but one process hashes all shards.
5. **Node failures.** Losing a node loses the work since the last checkpoint: the job exits, is
   requeued and resumes (`scripts/slurm.sh`). Elastic training is not supported; a run can resume on
   fewer machines with the same samples if they can form the `global_batch`.
"""


def main() -> None:
    """Write the document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilization")
    parser.add_argument("--image-kb", type=float, default=200, help="KB per image in the shards")
    parser.add_argument("--to", type=Path, default=Path("docs/scaling.md"))
    options = parser.parse_args()
    options.to.write_text(page(options.mfu, options.image_kb))
    print(options.to)


if __name__ == "__main__":
    main()
