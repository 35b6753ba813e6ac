"""Scores of images, whoever drew them: nothing here knows a stage or a sampler."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from wuerstchen_pl.evaluation.image_folder import ImageFolder, check_same_prompts
from wuerstchen_pl.evaluation.metrics.clip import Clip
from wuerstchen_pl.evaluation.metrics.distances import (
    FrechetDistance,
    check_enough,
    inception_score,
    kernel_distance,
)
from wuerstchen_pl.evaluation.metrics.feature_networks import FeatureNetwork, Inception, batched
from wuerstchen_pl.evaluation.metrics.preference import pairwise_wins
from wuerstchen_pl.evaluation.metrics.score import Score, mean_score, proportion_score, set_score
from wuerstchen_pl.io.atomic import atomic_write

SIDE = {"fid": 256, "kid": 256, "is": 299}
"""Pixels that images are resized to, as in the paper."""
BATCH = 32


def set_metrics(
    metrics: Sequence[str],
    images: ImageFolder,
    network: FeatureNetwork,
    reference: Iterable[Tensor] | None,
    cache_dir: str | None = None,
    kept: dict[str, Tensor] | None = None,
) -> dict[str, Score]:
    """``fid`` and ``kid`` to a reference, and ``is``; of another network, ``fd_`` and ``kd_``.

    Args:
        metrics: of these, those that are wanted.
        images: to judge.
        network: of features.
        reference: images (3, H, W) uint8 to compare with.
        cache_dir: where a reference folder's features are kept.
        kept: the same in memory, of whatever reference; found features are added.

    Raises:
        ValueError: if there are too few for a covariance.
    """
    found = {}
    if wanted := [name for name in ("fid", "kid") if name in metrics]:
        assert reference is not None
        ours = features(images, network, "drawn")
        kept = {} if kept is None else kept
        if network.weights_sha256 not in kept:
            found_anew = cached_features(reference, network, cache_dir)
            kept[network.weights_sha256] = found_anew
        theirs = kept[network.weights_sha256]
        for name in wanted:
            check_enough(name, network.width, len(ours), len(theirs))
            measure = (
                FrechetDistance(theirs)
                if name == "fid"
                else partial(kernel_distance, reference=theirs)
            )
            facts = {
                "reference": len(theirs),
                "weights_sha256": network.weights_sha256,
                **BIAS[name],
            }
            found[metric_name(name, network)] = distance(ours, measure, **facts)
    if "is" in metrics:
        assert isinstance(network, Inception)
        device = next(network.parameters()).device
        batches = batched(images, SIDE["is"], BATCH)
        logits = torch.cat([network.logits(batch.to(device)).cpu() for batch in batches])
        sha256 = network.weights_sha256
        found["is"] = distance(logits, inception_score, weights_sha256=sha256)
    return found


def metric_name(name: str, network: FeatureNetwork) -> str:
    """A distance's name: FID and KID are Inception's alone."""
    if network.name == "inception":
        return name
    return f"{name.replace('fid', 'fd').replace('kid', 'kd')}_{network.name}"


BIAS: dict[str, dict[str, Any]] = {
    "fid": {"least": 0.0, "bias": "upwards, in proportion to 1 / number of images"},
    "kid": {"bias": "none"},
}
"""The finite-sample bias of a distance: compare Frechet distances of equal numbers only."""


def distance(ours: Tensor, measure: Callable[[Tensor], float], **facts: Any) -> Score:
    """The distance of (N, D) features from what ``measure`` compares with."""
    return set_score(lambda own: measure(ours[own]), len(ours), **facts)


def features(images: Iterable[Tensor], network: FeatureNetwork, what: str) -> Tensor:
    """Images (3, H, W) uint8 -> (N, D) features on the CPU."""
    device = next(network.parameters()).device  # type: ignore[attr-defined]
    squares = batched(images, SIDE["fid"], BATCH)
    shown = tqdm(squares, desc=f"features, {what}", unit="batch")
    return torch.cat([network.features(batch.to(device)).cpu() for batch in shown])


def cached_features(
    reference: Iterable[Tensor], network: FeatureNetwork, cache_dir: str | None
) -> Tensor:
    """Features of a reference, read again if its folder and the network are what they were."""
    if cache_dir is None or not isinstance(reference, ImageFolder):
        return features(reference, network, "reference")
    name = f"{network.name}-{network.weights_sha256[:16]}-{reference.fingerprint()[:16]}"
    path = Path(cache_dir, f"{name.replace(' ', '')}.safetensors")
    with suppress(OSError, SafetensorError, KeyError):  # none yet, or damaged: computed again
        return load_file(path)["features"]
    found = features(reference, network, "reference")
    with atomic_write(path) as temporary:
        save_file({"features": found}, temporary)
    return found


def text_metric(images: ImageFolder, model: Clip, name: str) -> Score:
    """How well each image fits its prompt.

    Raises:
        ValueError: if the prompts are not known.
    """
    if images.prompts is None:
        raise ValueError(
            f"metric={name} compares with texts, and {images.path} has no images.json that "
            "names them; set prompts= to a file of them"
        )
    found: list[float] = []
    for start in tqdm(range(0, len(images), BATCH), desc=name, unit="batch"):
        numbers = range(start, min(start + BATCH, len(images)))
        texts = [images.prompts[n] for n in numbers]
        found += model.scores([images.image(n) for n in numbers], texts).tolist()
    return mean_score(found, weights_sha256=model.weights_sha256)


def win_rates(
    images: ImageFolder, others: Sequence[ImageFolder], ours: Score, model: Clip
) -> dict[str, Score]:
    """``win_rate/<folder>``: the share of prompts whose image is preferred to the other's.

    Raises:
        ValueError: if another folder is not of the same prompts.
    """
    for other in others:
        check_same_prompts(images, other)
    found = {}
    for other in others:
        other.prompts = images.prompts
        theirs = text_metric(other, model, f"pickscore of {other.path.name}")
        each = pairwise_wins(ours.per_sample, theirs.per_sample)
        counts = {kind: each.count(share) for kind, share in OUTCOMES.items()}
        found[f"win_rate/{_unique_name(other, others)}"] = proportion_score(
            each, **counts, theirs=theirs.value
        )
    return found


OUTCOMES = {"won": 1.0, "tied": 0.5, "lost": 0.0}


def _unique_name(folder: ImageFolder, others: Sequence[ImageFolder]) -> str:
    """A folder's name, with as many above it as tell it from the others."""
    parts = folder.path.resolve().parts
    for depth in range(1, len(parts)):
        name = "/".join(parts[-depth:])
        if sum("/".join(o.path.resolve().parts[-depth:]) == name for o in others) == 1:
            return name
    return str(folder.path)
