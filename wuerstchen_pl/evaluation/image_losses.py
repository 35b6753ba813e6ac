"""The loss of each image that a model was trained or validated on."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from wuerstchen_pl.evaluation.dataset_metrics import SPLITS
from wuerstchen_pl.evaluation.metrics.score import Score, mean_score
from wuerstchen_pl.evaluation.scored_images import ScoredImages, thumbnail
from wuerstchen_pl.io.images import to_float
from wuerstchen_pl.stages.decoder_stage import DecoderStage
from wuerstchen_pl.stages.text_conditional import TextConditionalStage

if TYPE_CHECKING:
    from wuerstchen_pl.data.datamodule import ImageTextDataModule
    from wuerstchen_pl.data.sources.source import Split

StageWithLoss = DecoderStage | TextConditionalStage
NUM_BINS = 10
MAX_TRAINING_IMAGES = 1000


def image_losses(
    stages: Mapping[str, StageWithLoss], data: "ImageTextDataModule"
) -> tuple[dict[str, Score], list[ScoredImages]]:
    """Losses of validation and training images, at fixed times and with fixed noise for each.

    Args:
        stages: name -> stage with a loss, in eval mode, with the weights to evaluate.
        data: the data module. Of more than ``MAX_TRAINING_IMAGES`` training images, evenly spaced
            batches are used.

    Returns:
        The means ``stage_c/loss`` of validation, also in bins of t as ``stage_c/loss_t0.05``, and
        ``stage_c_train/loss`` of training; and the images of each split that has any.
    """
    scores: dict[str, Score] = {}
    splits: list[ScoredImages] = []
    for split, suffix in SPLITS.items():
        rows, measured = _measure(stages, _batches(data, split))
        if not rows:
            continue
        means = {
            f"stage_{name}{suffix}/loss": losses.mean(dim=1).tolist()
            for name, (_, losses) in measured.items()
        }
        names, captions, thumbnails = zip(*rows, strict=True)
        splits.append(
            ScoredImages(
                file=f"{split}_losses.csv", names=names, prompts=captions, sources=thumbnails,
                scores=means,
            )
        )  # fmt: skip
        scores |= {name: mean_score(values) for name, values in means.items()}
        for name, (times, losses) in measured.items() if split == "val" else ():
            scores |= _in_bins(f"stage_{name}", times, losses)
    return scores, splits


def _batches(data: "ImageTextDataModule", split: "Split") -> Iterator[dict[str, Any]]:
    loader, stride = data.in_order(split, alone=True), 1
    if split == "train":
        num_images = sum(len(spec.rows) for spec in data.specs_in_order(split, alone=True))
        stride = max(1, math.ceil(num_images / MAX_TRAINING_IMAGES))
    total = math.ceil(len(loader) / stride)
    batches = islice(loader, 0, None, stride)
    yield from tqdm(batches, desc=f"losses, {split}", unit="batch", total=total)


def _measure(
    stages: Mapping[str, StageWithLoss], batches: Iterable[dict[str, Any]]
) -> tuple[list[tuple[str, str, str]], dict[str, Tensor]]:
    """(key, caption, thumbnail) of N images, and per stage (2, N, T) times and losses."""
    rows: list[tuple[str, str, str]] = []
    measured: dict[str, list[Tensor]] = {name: [] for name in stages}
    for batch in batches:
        thumbnails = map(thumbnail, batch["image"])
        rows += zip(batch["key"], batch["caption"], thumbnails, strict=True)
        for name, stage in stages.items():
            times, losses = stage.validation_losses(_on_device_of(stage, batch))
            measured[name].append(torch.stack([times.cpu(), losses.float().cpu()]))
    return rows, {name: torch.cat(parts, dim=1) for name, parts in measured.items() if parts}


def _on_device_of(stage: StageWithLoss, batch: dict[str, Any]) -> Any:
    """The batch of the contract with stages, whose images a loss reads on its device."""
    device, images = next(stage.parameters()).device, {"image", "mask", "control"} & batch.keys()
    return batch | {key: to_float(batch[key].to(device)) for key in images}


def _in_bins(stage: str, times: Tensor, losses: Tensor) -> dict[str, Score]:
    """The means of (N, T) losses in bins of their times, named by the bins' centers."""
    bins, scores = (times * NUM_BINS).long().clamp(max=NUM_BINS - 1), {}
    for index in range(NUM_BINS):
        if (in_bin := losses[bins == index]).numel():
            name = f"{stage}/loss_t{(index + 0.5) / NUM_BINS:.2f}"
            # one value per image and time in this bin
            scores[name] = mean_score(in_bin.tolist(), of="times")
    return scores
