"""Scores of a model on the data that it was trained on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from tqdm import tqdm

from wuerstchen_pl.evaluation.datasets import DatasetImages
from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.evaluation.image_metrics import BIAS, distance, features, metric_name
from wuerstchen_pl.evaluation.metrics.distances import FrechetDistance, check_enough
from wuerstchen_pl.evaluation.metrics.feature_networks import FeatureNetwork
from wuerstchen_pl.evaluation.metrics.reconstruction import Compare, compare_images, psnr, ssim
from wuerstchen_pl.evaluation.metrics.retrieval import pooled_pixels, ranks, shuffle_control
from wuerstchen_pl.evaluation.metrics.score import Score, mean_score, proportion_score
from wuerstchen_pl.models.vqgan import codebook_usage
from wuerstchen_pl.pipelines.cascade import CascadePipeline
from wuerstchen_pl.pipelines.generate import SamplingConfig, autoencode, reconstruct
from wuerstchen_pl.pipelines.wuerstchen import WuerstchenPipeline

NUM_BINS = 10
SPLITS = {"val": "", "train": "_train"}
"""And what stands behind a stage's name."""


def reconstructions(
    pipeline: CascadePipeline, data: Any, settings: SamplingConfig, lpips: Compare | None = None
) -> dict[str, Score]:
    """Of Stage A, and of compressor + B + A, on both splits; and how the codebook is used.

    Args:
        pipeline: the cascade.
        data: the data module.
        settings: Stage B's steps.
        lpips: adds LPIPS.
    """
    by: dict[str, Compare] = {"psnr": psnr, "ssim": ssim}
    if lpips is not None:
        by["lpips"] = lpips
    found = {}
    for stage in autoencoders(pipeline):
        for split, suffix in SPLITS.items():
            pairs = reconstructed_batches(pipeline, data, settings, stage, split)
            for name, each in compare_images(pairs, by).items():
                found[f"stage_{stage}{suffix}/{name}"] = mean_score(each)
    images = (batch["image"] for batch in data.in_order("train", alone=True))
    return found | codebook(pipeline, images)


def autoencoders(pipeline: CascadePipeline) -> str:
    """``a``, and ``b`` where there is a compressor."""
    return "a" if pipeline.compressor is None else "ab"


def reconstructed_batches(
    pipeline: CascadePipeline, data: Any, settings: SamplingConfig, stage: str, split: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a split with what ``a``, or compressor, ``b`` and A, make of them."""
    batches = data.in_order(split, alone=True)
    for batch in tqdm(batches, desc=f"stage {stage}, {split}", unit="batch"):
        images = batch["image"]
        if stage == "a":
            yield images, autoencode(pipeline, images)
        else:
            assert isinstance(pipeline, WuerstchenPipeline)
            seeds = [crc32(key.encode()) for key in batch["key"]]  # whatever else is in the batch
            yield images, reconstruct(pipeline, images, settings.decoder_steps, seeds=seeds)


@torch.no_grad()
def codebook(pipeline: CascadePipeline, batches: Iterable[Tensor]) -> dict[str, Score]:
    """Images (B, 3, H, W) in [0, 1] -> perplexity of their codes, and codes that none has."""
    vqgan, number = pipeline.decoder.vqgan, 0
    uses = torch.zeros(vqgan.quantizer.codebook.num_embeddings)
    for images in batches:
        number += len(images)
        indices = vqgan.quantizer.indices(vqgan.features(images.to(pipeline.placement.device)))
        uses += torch.bincount(indices.flatten().cpu(), minlength=len(uses))
    values = dict(zip(("perplexity", "dead"), map(float, codebook_usage(uses)), strict=True))
    return {
        f"codebook/{name}": Score(
            value=value, low=None, high=None, number=number, facts={"codes": len(uses)}
        )
        for name, value in values.items()
    }


def rfid(
    pipeline: CascadePipeline, data: Any, settings: SamplingConfig, network: FeatureNetwork
) -> dict[str, Score]:
    """Frechet distance of training images to what comes back of them.

    Raises:
        ValueError: if there are too few for a covariance.
    """
    originals = features(DatasetImages(data), network, "training images")
    check_enough("rfid", network.width, len(originals))
    measure, found = FrechetDistance(originals), {}
    for stage in autoencoders(pipeline):
        pairs = reconstructed_batches(pipeline, data, settings, stage, "train")
        back = features(to_uint8(back for _, back in pairs), network, f"stage {stage}")
        found[f"stage_{stage}_train/r{metric_name('fid', network)}"] = distance(
            back, measure, **BIAS["fid"]
        )
    return found


def to_uint8(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Batches (B, 3, H, W) in [0, 1] -> images (3, H, W) uint8."""
    for batch in batches:
        yield from (batch.float() * 255).round().byte()


def retrievals(
    drawn: ImageFolder, own: Sequence[int], reference: Iterable[Tensor], pipeline: CascadePipeline
) -> dict[str, Score]:
    """How often a drawn image's own training image is the nearest, or among the nearest five.

    By average-pooled pixels and by semantic latents, each beside the same with captions shuffled.

    Args:
        drawn: images drawn for training captions.
        own: the place of each one's image among the reference.
        reference: the training images, (3, H, W) uint8.
        pipeline: whose compressor compares.
    """
    spaces: dict[str, Callable[[Iterable[Tensor]], Tensor]] = {"": pooled_pixels}
    if isinstance(pipeline, WuerstchenPipeline) and pipeline.compressor is not None:
        spaces["_semantic"] = lambda p: pooled_semantic(pipeline, p)
    found: dict[str, Score] = {}
    for suffix, space in spaces.items():
        near = space(to_float(reference))
        ours = space(to_float(drawn))
        for control, places in (("", list(own)), ("_shuffled", shuffle_control(own))):
            found |= topk_scores(
                f"retrieval{suffix}{control}", ranks(ours, near, places), len(near)
            )
    return found


def topk_scores(name: str, found: Sequence[int], references: int) -> dict[str, Score]:
    """Ranks -> the shares of the first, and of the first five."""
    return {
        f"{name}/top{most}": proportion_score(
            [float(rank < most) for rank in found],
            reference=references,
            chance=min(1.0, most / references),
        )
        for most in (1, 5)
    }


def to_float(images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Bytes -> (3, H, W) in [0, 1]."""
    return (image.float() / 255 for image in images)


def pooled_semantic(pipeline: WuerstchenPipeline, images: Iterable[Tensor]) -> Tensor:
    """Images (3, H, W) of any size -> (N, S * 4 * 4) average-pooled semantic latents."""
    rows = [pipeline.encode(image[None])[0].float().cpu() for image in images]
    pooled = [torch.nn.functional.adaptive_avg_pool2d(row, 4).flatten() for row in rows]
    return torch.stack(pooled)


def validation_losses(stages: dict[str, Any], data: Any) -> dict[str, Score]:
    """The losses of Stages B and C at times and with noise of each image's own, and over t.

    Args:
        stages: those with such losses by name, in eval mode, with the weights to judge.
        data: the data module, whose validation split is used.
    """
    found: dict[str, Score] = {}
    for name, stage in stages.items():
        times: list[Tensor] = []
        losses: list[Tensor] = []
        for batch in tqdm(data.in_order("val", alone=True), desc=f"loss of stage {name}"):
            batch["image"] = batch["image"].to(next(stage.parameters()).device)
            t, loss = stage.validation_losses(batch)
            times.append(t.cpu())
            losses.append(loss.float().cpu())
        t, loss = torch.cat(times), torch.cat(losses)
        found[f"stage_{name}/loss"] = mean_score(loss.mean(dim=1).tolist())
        band = (t * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        for number in range(NUM_BINS):
            if (own := loss[band == number]).numel():
                middle = (number + 0.5) / NUM_BINS
                # of each image at times of this band
                found[f"stage_{name}/loss_t{middle:.2f}"] = mean_score(own.tolist(), of="times")
    return found
