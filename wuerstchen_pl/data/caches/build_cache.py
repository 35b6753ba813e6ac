"""Makes a cache: every image and caption through frozen networks once, shard by shard.

A shard of the source becomes some files of the cache, and then a note that it is done: what a run
that was stopped finds so, it does not do again. Several processes each take a share of the shards.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from wuerstchen_pl.data.caches.cached_dataset import EMPTY, ShardWriter, write_manifest
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.loading.loader import OnceLoader
from wuerstchen_pl.data.ordering.batches import BatchSpec, sequential_batches
from wuerstchen_pl.data.ordering.buckets import Size
from wuerstchen_pl.data.ordering.stream import EpochSample
from wuerstchen_pl.data.sources.source import Sample, Split, name_digest
from wuerstchen_pl.io.atomic import atomic_write, write_text


class Encoders(Protocol):
    """The frozen networks."""

    def images(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [0, 1] -> tensors (B, ...) on the CPU, by name."""

    def captions(self, captions: list[str]) -> Tensor | None:
        """B captions -> (B, L, D) states on the CPU; None where they are not cached."""


@dataclass(slots=True)
class EncodedSample:
    """What was made of a sample: one entry for each of its crops, and its captions' states."""

    size: Size = (0, 0)
    crops: list[dict[str, Tensor]] = field(default_factory=list)
    text: Tensor | None = None


def build_cache(
    data: ImageTextDataModule,
    encoders: Encoders,
    folder: Path,
    *,
    settings: dict[str, Any],
    crops: int,
    shard_mb: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[str]:
    """Write what is missing of a cache, and its manifest when nothing is.

    A single process writes the manifest without shards that cannot be read, too.

    Args:
        data: whose images; set up.
        encoders: what they go through.
        folder: of the cache, claimed.
        settings: go into the manifest.
        crops: of each training image: those that training would see in its first passes.
        shard_mb: size of a file, about.
        rank: of this process, in [0, world_size).
        world_size: number of processes that share the work.

    Returns:
        The shards that are missing: they cannot be read, or other processes are still at them.
    """
    count = _samples_per_file(data, encoders, crops, shard_mb)
    units = list(_units(data))
    with tqdm(desc=f"encoding to {folder}", unit=" images", disable=rank > 0) as bar:
        for split, number, shard in units[rank::world_size]:
            note = folder / f"{split}-{number:05d}.json"
            done = _noted(note, shard) is not None
            if done and not data.filters.deduplicate:  # else what comes later may be a copy
                continue
            opened = data.splits.opener.open(shard) if split == "train" else None
            samples = data.splits.first["val"] if opened is None else data.splits.samples_of(opened)
            if done:
                continue
            epochs = list(range(crops)) if split == "train" else [-1]
            names = []
            for part, some in enumerate(_parts(samples, count)):
                name = f"{split}-{number:05d}-{part:03d}-{_content(some)}.safetensors"
                names.append(name)
                if not (folder / name).is_file():
                    _write(folder / name, some, _made(data, encoders, some, epochs, bar))
            # A shard that could not be fetched may be there the next time.
            if opened is None or opened.samples or not opened.broken:
                write_text(note, json.dumps({"shard": shard, "files": names}))
    written: list[tuple[str, Split]] = []
    missing: list[str] = []
    for split, number, shard in units:
        noted = _noted(folder / f"{split}-{number:05d}.json", shard)
        written += [(name, split) for name in noted or ()]
        missing += [shard] if noted is None else []
    if not missing or world_size == 1:
        _complete(folder, written, encoders, settings)
    return missing


def _complete(
    folder: Path, written: list[tuple[str, Split]], encoders: Encoders, settings: dict[str, Any]
) -> None:
    """Write the manifest of what there is."""
    if not any(split == "train" for _, split in written):
        raise ValueError("nothing is left to train on: see what was left out above.")
    empty = encoders.captions([""])
    if empty is not None:
        with atomic_write(folder / EMPTY) as partial:
            save_file({"text": empty}, partial)
            partial.chmod(0o644)  # safetensors lets nobody else read
    write_manifest(folder, written, **settings)


Unit = tuple[Split, int, str]  # the last is what the note must say


def _units(data: ImageTextDataModule) -> Iterator[Unit]:
    """Name what is done at a time: each shard for training, and validation as a whole."""
    for number, shard in enumerate(data.splits.shards("train")):
        yield "train", number, shard
    yield "val", 0, f"validation {_content(data.splits.first['val'])}"


def _content(samples: list[Sample]) -> str:
    return name_digest("\n".join(sample.identity for sample in samples)).hex()[:8]


def _parts(samples: list[Sample], count: int) -> Iterator[list[Sample]]:
    for start in range(0, len(samples), count):
        yield samples[start : start + count]


def _samples_per_file(
    data: ImageTextDataModule, encoders: Encoders, crops: int, shard_mb: int
) -> int:
    height, width = max(data.sizes, key=lambda size: size[0] * size[1])
    one = encoders.images(torch.zeros(1, 3, height, width))
    size = crops * sum(tensor.nbytes for tensor in one.values())
    states = encoders.captions([""])
    size += 0 if states is None else states.nbytes
    return max(1, shard_mb * 1_000_000 // size)


def _made(
    data: ImageTextDataModule,
    encoders: Encoders,
    samples: list[Sample],
    epochs: list[int],
    bar: tqdm,
) -> list[EncodedSample]:
    """Put the samples of one file through the networks: for each its crops, as far as readable."""
    found = [EncodedSample() for _ in samples]
    numbers = {id(sample): number for number, sample in enumerate(samples)}
    requests = [
        BatchSpec(request.size, tuple(EpochSample(row.sample, epoch) for row in request.rows), None)
        for epoch in epochs
        for request in sequential_batches(
            samples, data.buckets, batch_size=data.batch_size, rank=0, world_size=1
        )
    ]
    loader = OnceLoader(data.dataset(), requests, stats=data.splits.stats, **data.loader_options())
    for request, (batch, report) in zip(requests, loader.reported(), strict=True):
        bar.update(len(request.rows))
        if not report.rows:
            continue
        tensors = encoders.images(batch["image"])
        own = [numbers[id(request.rows[row].sample)] for row in report.rows]
        for row, number in enumerate(own):
            found[number].size = request.size
            found[number].crops.append({n: tensor[row : row + 1] for n, tensor in tensors.items()})
        _add_text(encoders, [n for n in own if found[n].text is None], samples, found)
    for made in found:
        if len(made.crops) < len(epochs):  # it could be read at times: its rows would not fit
            made.crops = []
    return found


def _add_text(
    encoders: Encoders, numbers: list[int], samples: list[Sample], found: list[EncodedSample]
) -> None:
    """Encode all captions of some samples together."""
    captions = [caption for number in numbers for caption in samples[number].captions]
    states = encoders.captions(captions) if captions else None
    if states is None:
        return
    lengths = [len(samples[number].captions) for number in numbers]
    for number, own in zip(numbers, states.split(lengths), strict=True):
        found[number].text = own


def _write(path: Path, samples: list[Sample], found: list[EncodedSample]) -> None:
    """Write one file, its samples in their order."""
    writer = ShardWriter(path)
    for sample, made in zip(samples, found, strict=True):
        if made.crops:
            tensors = {n: torch.cat([crop[n] for crop in made.crops]) for n in made.crops[0]}
            writer.add(sample, made.size, tensors, made.text)
    writer.write()


def _noted(path: Path, shard: str) -> list[str] | None:
    """The files that a note says were made of a shard; None without one of this very shard."""
    try:
        note = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return note["files"] if note.get("shard") == shard else None
