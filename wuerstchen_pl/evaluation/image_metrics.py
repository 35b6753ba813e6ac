"""Metrics of images from any source, independent of stages and samplers."""

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

from wuerstchen_pl.evaluation.image_folder import ImageFolder
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
"""Side in pixels that images are resized to for each metric, as in the paper."""
BATCH = 32


def set_metrics(
    metrics: Sequence[str],
    images: ImageFolder,
    network: FeatureNetwork,
    reference: Iterable[Tensor] | None,
    cache_dir: str | None = None,
    feature_cache: dict[str, Tensor] | None = None,
) -> dict[str, Score]:
    """``fid`` and ``kid`` to a reference, and ``is``; ``fd_*`` and ``kd_*`` with another network.

    Args:
        metrics: names of metrics; those that are not set metrics are ignored.
        images: to evaluate.
        network: computes features.
        reference: images (3, H, W) uint8 to compare with.
        cache_dir: where features of a reference folder are cached on disk.
        feature_cache: in-memory cache of reference features by the network's sha256; updated.

    Raises:
        ValueError: if there are too few images to estimate a covariance.
    """
    scores = {}
    if distances := [name for name in ("fid", "kid") if name in metrics]:
        assert reference is not None
        generated = features(images, network, "generated")
        feature_cache = {} if feature_cache is None else feature_cache
        if network.weights_sha256 not in feature_cache:
            cached = cached_features(reference, network, cache_dir)
            feature_cache[network.weights_sha256] = cached
        reference_features = feature_cache[network.weights_sha256]
        for name in distances:
            check_enough(name, network.width, len(generated), len(reference_features))
            measure = (
                FrechetDistance(reference_features)
                if name == "fid"
                else partial(kernel_distance, reference=reference_features)
            )
            metadata = {
                "reference": len(reference_features),
                "weights_sha256": network.weights_sha256,
                **BIAS[name],
            }
            scores[metric_name(name, network)] = distance(generated, measure, **metadata)
    if "is" in metrics:
        assert isinstance(network, Inception)
        device = next(network.parameters()).device
        batches = batched(images, SIDE["is"], BATCH)
        logits = torch.cat([network.logits(batch.to(device)).cpu() for batch in batches])
        sha256 = network.weights_sha256
        scores["is"] = distance(logits, inception_score, weights_sha256=sha256)
    return scores


def metric_name(name: str, network: FeatureNetwork) -> str:
    """The name of a distance: ``fid`` and ``kid`` only with Inception features."""
    if network.name == "inception":
        return name
    return f"{name.replace('fid', 'fd').replace('kid', 'kd')}_{network.name}"


BIAS: dict[str, dict[str, Any]] = {
    "fid": {"min_value": 0.0, "bias": "upwards, in proportion to 1 / number of images"},
    "kid": {"bias": "none"},
}
"""Finite-sample bias: Frechet distances are comparable only for equal numbers of images."""


def distance(generated: Tensor, measure: Callable[[Tensor], float], **metadata: Any) -> Score:
    """Apply ``measure`` to (N, D) features, with its interval."""
    return set_score(lambda indices: measure(generated[indices]), len(generated), **metadata)


def features(images: Iterable[Tensor], network: FeatureNetwork, label: str) -> Tensor:
    """Images (3, H, W) uint8 -> (N, D) features on the CPU; ``label`` names the progress bar."""
    device = next(network.parameters()).device  # type: ignore[attr-defined]
    squares = batched(images, SIDE["fid"], BATCH)
    batches = tqdm(squares, desc=f"features, {label}", unit="batch")
    return torch.cat([network.features(batch.to(device)).cpu() for batch in batches])


def cached_features(
    reference: Iterable[Tensor], network: FeatureNetwork, cache_dir: str | None
) -> Tensor:
    """Features of a reference; cached on disk for a folder, by its fingerprint and the network."""
    if cache_dir is None or not isinstance(reference, ImageFolder):
        return features(reference, network, "reference")
    name = f"{network.name}-{network.weights_sha256[:16]}-{reference.fingerprint()[:16]}"
    path = Path(cache_dir, f"{name.replace(' ', '')}.safetensors")
    with suppress(OSError, SafetensorError, KeyError):  # missing or damaged: computed below
        return load_file(path)["features"]
    computed = features(reference, network, "reference")
    with atomic_write(path) as temporary:
        save_file({"features": computed}, temporary)
    return computed


def text_metric(images: ImageFolder, prompts: Sequence[str], model: Clip, name: str) -> Score:
    """The mean score of how well each image matches its prompt; ``name`` labels the progress."""
    scores: list[float] = []
    for start in tqdm(range(0, len(images), BATCH), desc=name, unit="batch"):
        indices = range(start, min(start + BATCH, len(images)))
        texts = [prompts[i] for i in indices]
        scores += model.scores([images.image(i) for i in indices], texts).tolist()
    return mean_score(scores, weights_sha256=model.weights_sha256)


def win_rates(
    prompts: Sequence[str], baselines: Sequence[ImageFolder], pickscores: Score, model: Clip
) -> dict[str, Score]:
    """``win_rate/<folder>``: the share of prompts whose image scores above the baseline's."""
    scores = {}
    for baseline in baselines:
        baseline_scores = text_metric(
            baseline, prompts, model, f"pickscore of {baseline.path.name}"
        )
        wins = pairwise_wins(pickscores.per_sample, baseline_scores.per_sample)
        counts = {outcome: wins.count(value) for outcome, value in OUTCOMES.items()}
        scores[f"win_rate/{_unique_name(baseline, baselines)}"] = proportion_score(
            wins, **counts, baseline=baseline_scores.value
        )
    return scores


OUTCOMES = {"won": 1.0, "tied": 0.5, "lost": 0.0}


def _unique_name(folder: ImageFolder, folders: Sequence[ImageFolder]) -> str:
    """The shortest suffix of a folder's path that is unique among ``folders``."""
    parts = folder.path.resolve().parts
    for depth in range(1, len(parts)):
        name = "/".join(parts[-depth:])
        if sum("/".join(o.path.resolve().parts[-depth:]) == name for o in folders) == 1:
            return name
    return str(folder.path)
