"""Scores of pictures, whoever drew them: nothing here knows a stage or a sampler."""

import os
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

from wuerstchen_pl.evaluation.folder import Folder, check_same_prompts
from wuerstchen_pl.metrics.clip import Clip
from wuerstchen_pl.metrics.distances import FrechetTo, check_enough, inception_score, kernel
from wuerstchen_pl.metrics.networks import Inception, Network, batched
from wuerstchen_pl.metrics.preference import wins
from wuerstchen_pl.metrics.score import Score, mean, of_set

SIDE = {"fid": 256, "kid": 256, "is": 299}
"""Pixels that pictures are resized to, as in the paper."""
BATCH = 32


def of_sets(
    metrics: Sequence[str],
    pictures: Folder,
    network: Network,
    reference: Iterable[Tensor] | None,
    cache_dir: str | None = None,
    kept: dict[str, Tensor] | None = None,
) -> dict[str, Score]:
    """``fid`` and ``kid`` to a reference, and ``is``; of another network, ``fd_`` and ``kd_``.

    Args:
        metrics: of these, those that are wanted.
        pictures: to judge.
        network: of features.
        reference: pictures (3, H, W) uint8 to compare with.
        cache_dir: where a reference folder's features are kept.
        kept: the same in memory, of whatever reference; found features are added.

    Raises:
        ValueError: if there are too few for a covariance.
    """
    found = {}
    if wanted := [name for name in ("fid", "kid") if name in metrics]:
        assert reference is not None
        ours = features(pictures, network, "drawn")
        kept = {} if kept is None else kept
        if network.weights_sha256 not in kept:
            found_anew = kept_features(reference, network, cache_dir)
            kept[network.weights_sha256] = found_anew
        theirs = kept[network.weights_sha256]
        for name in wanted:
            check_enough(name, network.width, len(ours), len(theirs))
            measure = FrechetTo(theirs) if name == "fid" else partial(kernel, reference=theirs)
            facts = {"reference": len(theirs), "weights_sha256": network.weights_sha256}
            found[called(name, network)] = distance(ours, measure, **facts)
    if "is" in metrics:
        assert isinstance(network, Inception)
        device = next(network.parameters()).device
        batches = batched(pictures, SIDE["is"], BATCH)
        logits = torch.cat([network.logits(batch.to(device)).cpu() for batch in batches])
        sha256 = network.weights_sha256
        found["is"] = distance(logits, inception_score, weights_sha256=sha256)
    return found


def called(name: str, network: Network) -> str:
    """A distance's name: FID and KID are Inception's alone."""
    if network.name == "inception":
        return name
    return f"{name.replace('fid', 'fd').replace('kid', 'kd')}_{network.name}"


def distance(ours: Tensor, measure: Callable[[Tensor], float], **facts: Any) -> Score:
    """The distance of (N, D) features from what ``measure`` compares with."""
    return of_set(lambda own: measure(ours[own]), len(ours), **facts)


def features(pictures: Iterable[Tensor], network: Network, what: str) -> Tensor:
    """Pictures (3, H, W) uint8 -> (N, D) features on the CPU."""
    device = next(network.parameters()).device  # type: ignore[attr-defined]
    squares = batched(pictures, SIDE["fid"], BATCH)
    shown = tqdm(squares, desc=f"features, {what}", unit="batch")
    return torch.cat([network.features(batch.to(device)).cpu() for batch in shown])


def kept_features(reference: Iterable[Tensor], network: Network, cache_dir: str | None) -> Tensor:
    """Features of a reference, read again if its folder and the network are what they were."""
    if cache_dir is None or not isinstance(reference, Folder):
        return features(reference, network, "reference")
    name = f"{network.name}-{network.weights_sha256[:16]}-{reference.fingerprint()[:16]}"
    path = Path(cache_dir, f"{name.replace(' ', '')}.safetensors")
    with suppress(OSError, SafetensorError, KeyError):  # none yet, or damaged: found anew
        return load_file(path)["features"]
    found = features(reference, network, "reference")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"features": found}, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)
    return found


def of_texts(pictures: Folder, model: Clip, name: str) -> Score:
    """How well each picture fits its prompt.

    Raises:
        ValueError: if the prompts are not known.
    """
    if pictures.prompts is None:
        raise ValueError(
            f"metric={name} compares with texts, and {pictures.path} has no pictures.json that "
            "names them; set prompts= to a file of them"
        )
    found: list[float] = []
    for start in tqdm(range(0, len(pictures), BATCH), desc=name, unit="batch"):
        numbers = range(start, min(start + BATCH, len(pictures)))
        texts = [pictures.prompts[n] for n in numbers]
        found += model.scores([pictures.picture(n) for n in numbers], texts).tolist()
    return mean(found, weights_sha256=model.weights_sha256)


def win_rates(
    pictures: Folder, others: Sequence[Folder], ours: Score, model: Clip
) -> dict[str, Score]:
    """``win_rate/<folder>``: the share of prompts whose picture is preferred to the other's.

    Raises:
        ValueError: if another folder is not of the same prompts.
    """
    for other in others:
        check_same_prompts(pictures, other)
    found = {}
    for other in others:
        other.prompts = pictures.prompts
        theirs = of_texts(other, model, f"pickscore of {other.path.name}")
        each = wins(ours.each, theirs.each)
        counts = {kind: each.count(share) for kind, share in WON.items()}
        found[f"win_rate/{_distinct(other, others)}"] = mean(each, **counts, theirs=theirs.value)
    return found


WON = {"won": 1.0, "tied": 0.5, "lost": 0.0}


def _distinct(folder: Folder, others: Sequence[Folder]) -> str:
    """A folder's name, with as many above it as tell it from the others."""
    parts = folder.path.resolve().parts
    for depth in range(1, len(parts)):
        name = "/".join(parts[-depth:])
        if sum("/".join(o.path.resolve().parts[-depth:]) == name for o in others) == 1:
            return name
    return str(folder.path)
