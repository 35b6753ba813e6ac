"""What the paper's recipes take: ``python -m scripts.scaling`` writes docs/scaling.md.

Operations are counted on networks without memory, from the recipes as they are composed; nothing is
timed. Hours follow from an assumed share of the devices' peak rate, and beside them stands the
share that the paper's own hours imply.
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

from wuerstchen_pl.cli import conf_dir
from wuerstchen_pl.data.ordering.buckets import Buckets

RECIPES = (
    "paper_a", "paper_b_512", "paper_b_1024", "paper_c_1", "paper_c_2", "paper_c_3", "paper_c_4",
)  # fmt: skip
PUBLISHED_HOURS = {"b": 11_000, "c": 24_602}  # arXiv 2306.00637
PEAK = 312e12  # of an A100, dense bfloat16
BYTES = 4 + 4 + 4 + 8  # of a trained weight: itself, its gradient, its average, its moments


class Need(NamedTuple):
    """Of one recipe."""

    name: str
    stage: str
    steps: int
    batch: int
    flops: float  # of a sample, forward and backward
    weights: int  # that are trained

    @property
    def samples(self) -> int:
        """In all."""
        return self.steps * self.batch

    def hours(self, share: float) -> float:
        """Of one A100."""
        return self.samples * self.flops / (PEAK * share) / 3600


def need(name: str) -> Need:
    """Count one recipe."""
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = hydra.compose("train", [f"experiment={name}", "data.urls=x"])
        stage = name.split("_")[1]
        below = {s: hydra.compose("train", [f"stage={s}", "preset=paper"]).stage for s in "ab"}
    with torch.device("meta"):
        found = [operations(stage, cfg, below, *size) for size in sizes(cfg)]
        trained = built(cfg, stage, below)
    weights = sum(p.numel() for net in trained for p in net.parameters())
    flops = sum(found) / len(found)
    return Need(name, stage, cfg.trainer.max_steps, cfg.global_batch, flops, weights)


def sizes(cfg: DictConfig) -> list[tuple[int, int]]:
    """The (height, width) of a recipe's batches."""
    data = cfg.data
    ratios = list(data.ratios) if data.ratios else None
    buckets = Buckets(
        policy=data.buckets, image_size=data.image_size, multiple=data.bucket_multiple,
        ratios=ratios,
    )  # fmt: skip
    return list(buckets.sizes)


def built(cfg: DictConfig, stage: str, below: dict[str, DictConfig]) -> list[nn.Module]:
    """The networks that a stage trains."""
    parts = {"a": ["vqgan", "discriminator"], "b": ["diffnext", "compressor"], "c": ["prior"]}
    return [_network(cfg.stage[part]) for part in parts[stage]]


def _network(node: Any) -> nn.Module:
    node = {**node}
    if "backbone" in node and "weights" in node["backbone"]:
        node["backbone"] = {**node["backbone"], "weights": None}
    return hydra.utils.instantiate(node, _convert_="all")


def operations(
    stage: str, cfg: DictConfig, below: dict[str, DictConfig], height: int, width: int
) -> float:
    """Of a sample's forward and backward pass, frozen networks included, on the meta device."""
    images = torch.rand(2, 3, height, width)
    if stage == "a":
        vqgan, critic = built(cfg, stage, below)
        features = torchvision.models.vgg16().features
        own = counted(lambda: vqgan.decode_features(vqgan.features(images)))  # type: ignore[operator]
        # the critic sees real and drawn images to learn, and drawn ones to teach
        return 3 * own + 8 * counted(lambda: critic(images)) + 3 * counted(lambda: features(images))
    compressor = _network((cfg if stage == "b" else _b(below)).stage.compressor)
    h, w = compressor.latent_size(height, width)  # type: ignore[operator]
    t, semantic = torch.rand(2), torch.rand(2, 16, h, w)
    encoding = counted(lambda: compressor(images))
    if stage == "c":
        prior = _network(cfg.stage.prior)
        text = torch.rand(2, 77, cfg.stage.text_encoder.width)
        return 3 * counted(lambda: prior(semantic, t, text)) + encoding + text_operations(cfg)
    diffnext, vqgan = _network(cfg.stage.diffnext), _network(below["a"].vqgan)
    latents = torch.rand(2, 4, height // 4, width // 4)
    own = counted(lambda: diffnext(latents, t, semantic, None)) + encoding
    return 3 * own + counted(lambda: vqgan.encode(images))  # type: ignore[operator]


def _b(below: dict[str, DictConfig]) -> Any:
    return type("Config", (), {"stage": below["b"]})


def text_operations(cfg: DictConfig) -> float:
    """Of a caption in a CLIP tower: two a weight and token, and the scores."""
    text, tokens = cfg.stage.text_encoder, 77
    return text.depth * (2 * 12 * text.width**2 * tokens + 4 * tokens**2 * text.width)


def counted(forward: Callable[[], Tensor]) -> float:
    """Operations of a forward pass of two samples, for one."""
    with FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops() / 2


def page(share: float, image_kb: float) -> str:
    """The document."""
    needs = [need(name) for name in RECIPES]
    lines = [
        "# What the paper's recipes take", "",
        f"Written by `python -m scripts.scaling --share {share:g} --image-kb {image_kb:g}`: "
        "operations and weights are",
        "counted on the networks of `preset=paper`, and nothing was timed. Hours are of A100s (312",
        f"TFLOP/s in bfloat16) at {share:.0%} of that rate, which is an assumption.", "",
        "| recipe | samples | TFLOP a sample | A100 hours | days on 8 | 64 | 256 |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for n in needs:
        hours = n.hours(share)
        days = " | ".join(f"{hours / gpus / 24:.1f}" for gpus in (8, 64, 256))
        lines.append(
            f"| {n.name} | {n.samples / 1e6:.0f} M | {n.flops / 1e12:.3f} | {hours:,.0f} | {days} |"
        )
    lines += ["", "| stage | A100 hours so | published | share of the peak that these imply |"]
    lines += ["|---|---|---|---|"]
    for stage, published in PUBLISHED_HOURS.items():
        hours = sum(n.hours(share) for n in needs if n.stage == stage)
        implied = hours * share / published
        lines.append(f"| {stage.upper()} | {hours:,.0f} | {published:,} | {implied:.0%} |")
    lines += [
        "", "Weights, gradients, averages and moments take 20 bytes a weight, spread over the GPUs",
        "by `trainer=fsdp`; a checkpoint, 16. Activations come on top: a run measures them before",
        "its first step. FSDP moves 12 bytes a weight through each GPU's network in a step, DDP 8.",
        "",
        "| stage | weights | GB a GPU: 1 | 8 | 64 | 256 | checkpoint GB | GB a step, FSDP | DDP |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for n in (needs[0], needs[1], needs[3]):
        state = " | ".join(f"{BYTES * n.weights / gpus / 1e9:.2f}" for gpus in (1, 8, 64, 256))
        lines.append(
            f"| {n.stage.upper()} | {n.weights / 1e6:,.0f} M | {state} "
            + "".join(f"| {size * n.weights / 1e9:.1f} " for size in (16, 12, 8))
            + "|"
        )
    lines += [
        "", f"Images of {image_kb:g} KB, an assumption too: 103 M of them are "
        f"{103e6 * image_kb / 1e9:,.0f} TB. They come at", "",
        "| recipe | images/s on 8 | 64 | 256 | MB/s on 256 | decoding cores a GPU |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for n in needs:
        rate = PEAK * share / n.flops
        rates = " | ".join(f"{rate * gpus:,.0f}" for gpus in (8, 64, 256))
        lines.append(
            f"| {n.name} | {rates} | {rate * 256 * image_kb / 1e3:,.0f} | {rate / CORE_RATE:.1f} |"
        )
    return "\n".join([*lines, "", CLOSING])


CORE_RATE = 126.2
"""Images of 1024 px a second and core to 512 px; benchmarks/, AMD EPYC, 2026-11-21."""
CLOSING = f"""Decoding at {CORE_RATE} images a second and core, measured for JPEGs of 1024 px that
become batches of 512 px (`benchmarks/`, AMD EPYC, 2026-11-21); larger images decode slower.

## What would break first on the way to a billion images

1. **The first phases' data.** Stage A's steps are so cheap that decoding sets the pace: more cores,
   or smaller images in the shards. `speed/data_wait` says when it is so.
2. **Each machine downloads every shard that it reads from.** All processes walk one order and take
   their part of each batch; a machine reads the shards of a window whole. At a billion images,
   put the shards on a file system that all machines share, or make the cache once (`python -m
   wuerstchen_pl.cache`: 18 KB an image at 24 x 24 in place of the image).
3. **What grows with the set.** The names of all shards are in memory, 100,000 of them if each holds
   10,000 images; samples are known for a window at a time. `deduplicate` takes 120 bytes a
   image, and belongs into `data build`.
4. **Checkpoints by one process.** With `ddp` one process writes and hashes all; `fsdp` writes in
   parts, and one process still hashes them.
5. **One node lost is the run lost**, up to the last checkpoint: the job exits, is put into the
   queue, and goes on (`scripts/slurm.sh`). Elastic training is not attempted; fewer machines go on
   with the same samples, if `global_batch` can be made with them.
"""


def main() -> None:
    """The command-line program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=0.4, help="of the peak rate")
    parser.add_argument("--image-kb", type=float, default=200, help="of an image in the shards")
    parser.add_argument("--to", type=Path, default=Path("docs/scaling.md"))
    options = parser.parse_args()
    options.to.write_text(page(options.share, options.image_kb))
    print(options.to)


if __name__ == "__main__":
    main()
