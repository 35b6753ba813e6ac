"""Metrics of a model on its own training and validation data."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING
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
from wuerstchen_pl.io.images import to_float
from wuerstchen_pl.models.vqgan import codebook_usage
from wuerstchen_pl.pipelines.generate import autoencode, reconstruct
from wuerstchen_pl.pipelines.text_to_image import TextToImage
from wuerstchen_pl.pipelines.wuerstchen import WuerstchenPipeline
from wuerstchen_pl.sampling.config import SamplingConfig

if TYPE_CHECKING:
    from wuerstchen_pl.data.datamodule import ImageTextDataModule
    from wuerstchen_pl.data.sources.source import Split

SPLITS: dict["Split", str] = {"val": "", "train": "_train"}
"""Split -> suffix of the stage's name in metric names."""


def reconstructions(
    pipeline: TextToImage,
    data: "ImageTextDataModule",
    settings: SamplingConfig,
    lpips: Compare | None = None,
) -> dict[str, Score]:
    """Reconstruction metrics of Stage A and of compressor + B + A on both splits; codebook usage.

    Args:
        pipeline: the cascade.
        data: the data module.
        settings: sampling settings, of which only Stage B's steps are used.
        lpips: also measures LPIPS.
    """
    metrics: dict[str, Compare] = {"psnr": psnr, "ssim": ssim}
    if lpips is not None:
        metrics["lpips"] = lpips
    scores = {}
    for stage in autoencoders(pipeline):
        for split, suffix in SPLITS.items():
            pairs = reconstructed_batches(pipeline, data, settings, stage, split)
            for name, values in compare_images(pairs, metrics).items():
                scores[f"stage_{stage}{suffix}/{name}"] = mean_score(values)
    images = (to_float(batch["image"]) for batch in data.in_order("train", alone=True))
    return scores | codebook(pipeline, images)


def autoencoders(pipeline: TextToImage) -> str:
    """Stages that can reconstruct an image: ``a``, and ``b`` if there is a compressor."""
    has_compressor = isinstance(pipeline, WuerstchenPipeline) and pipeline.compressor is not None
    return "ab" if has_compressor else "a"


def reconstructed_batches(
    pipeline: TextToImage,
    data: "ImageTextDataModule",
    settings: SamplingConfig,
    stage: str,
    split: "Split",
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, reconstructions) of a split; ``b`` reconstructs by compressor + B + A."""
    batches = data.in_order(split, alone=True)
    for batch in tqdm(batches, desc=f"stage {stage}, {split}", unit="batch"):
        images = to_float(batch["image"])
        if stage == "a":
            yield images, autoencode(pipeline, images)
        else:
            assert isinstance(pipeline, WuerstchenPipeline)
            # seeds by sample, so that a reconstruction does not depend on its batch
            seeds = [crc32(key.encode()) for key in batch["key"]]
            yield images, reconstruct(pipeline, images, settings.decoder_steps, seeds=seeds)


@torch.no_grad()
def codebook(pipeline: TextToImage, batches: Iterable[Tensor]) -> dict[str, Score]:
    """Codebook perplexity and number of unused codes over images (B, 3, H, W) in [0, 1]."""
    vqgan, num_images = pipeline.vqgan, 0
    counts = torch.zeros(vqgan.quantizer.codebook.num_embeddings)
    for images in batches:
        num_images += len(images)
        indices = vqgan.quantizer.indices(vqgan.features(images.to(pipeline.placement.device)))
        counts += torch.bincount(indices.flatten().cpu(), minlength=len(counts))
    values = dict(zip(("perplexity", "dead"), map(float, codebook_usage(counts)), strict=True))
    return {
        f"codebook/{name}": Score(
            value=value, low=None, high=None, number=num_images, metadata={"codes": len(counts)}
        )
        for name, value in values.items()
    }


def rfid(
    pipeline: TextToImage,
    data: "ImageTextDataModule",
    settings: SamplingConfig,
    network: FeatureNetwork,
) -> dict[str, Score]:
    """Frechet distance between training images and their reconstructions.

    Raises:
        ValueError: if there are too few images to estimate a covariance.
    """
    originals = features(DatasetImages(data), network, "training images")
    check_enough("rfid", network.width, len(originals))
    measure, scores = FrechetDistance(originals), {}
    for stage in autoencoders(pipeline):
        pairs = reconstructed_batches(pipeline, data, settings, stage, "train")
        reconstructed = features(to_uint8(images for _, images in pairs), network, f"stage {stage}")
        scores[f"stage_{stage}_train/r{metric_name('fid', network)}"] = distance(
            reconstructed, measure, **BIAS["fid"]
        )
    return scores


def to_uint8(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Batches (B, 3, H, W) in [0, 1] -> images (3, H, W) uint8."""
    for batch in batches:
        yield from (batch.float() * 255).round().byte()


def retrievals(
    generated: ImageFolder,
    targets: Sequence[int],
    reference: DatasetImages,
    pipeline: TextToImage,
) -> dict[str, Score]:
    """Top-1 and top-5 retrieval of the image whose caption an image was generated for.

    By average-pooled pixels and by semantic latents, each with a control of shuffled captions.

    Args:
        generated: images generated for captions of a dataset.
        targets: for each of them, the dataset index of the image with its caption.
        reference: the dataset's images; generated images whose target is unreadable are ignored.
        pipeline: its compressor computes the semantic latents.
    """
    spaces: dict[str, Callable[[Iterable[Tensor]], Tensor]] = {"": pooled_pixels}
    if isinstance(pipeline, WuerstchenPipeline) and pipeline.compressor is not None:
        spaces["_semantic"] = lambda images: pooled_semantic(pipeline, images)
    positions: dict[int, int] = {}  # dataset index -> row of the candidates
    rows: dict[str, list[Tensor]] = {suffix: [] for suffix in spaces}
    for index, image in reference.indexed():
        positions[index] = len(positions)
        for suffix, embed in spaces.items():
            rows[suffix].append(embed([to_float(image)]))
    readable = [i for i, target in enumerate(targets) if target in positions]
    targets = [positions[targets[i]] for i in readable]
    scores: dict[str, Score] = {}
    for suffix, embed in spaces.items():
        candidates, queries = torch.cat(rows[suffix]), embed(map(to_float, generated))[readable]
        for control, indices in (("", list(targets)), ("_shuffled", shuffle_control(targets))):
            scores |= topk_scores(
                f"retrieval{suffix}{control}", ranks(queries, candidates, indices), len(candidates)
            )
    return scores


def topk_scores(name: str, target_ranks: Sequence[int], num_candidates: int) -> dict[str, Score]:
    """Zero-based ranks of the targets -> top-1 and top-5 accuracy, with their chance levels."""
    return {
        f"{name}/top{k}": proportion_score(
            [float(rank < k) for rank in target_ranks],
            reference=num_candidates,
            chance=min(1.0, k / num_candidates),
        )
        for k in (1, 5)
    }


def pooled_semantic(pipeline: WuerstchenPipeline, images: Iterable[Tensor]) -> Tensor:
    """Images (3, H, W) of any size -> (N, S * 4 * 4) average-pooled semantic latents."""
    latents = [pipeline.encode(image[None])[0].float().cpu() for image in images]
    pooled = [torch.nn.functional.adaptive_avg_pool2d(z, 4).flatten() for z in latents]
    return torch.stack(pooled)
