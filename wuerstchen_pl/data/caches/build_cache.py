"""Builds a cache: encodes every image and caption once with frozen networks, shard by shard.

A shard of the source becomes one or more files of the cache, followed by a record that it is done,
so a restarted run skips it. Several processes can share the shards.
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

from wuerstchen_pl.data.caches.cache_files import (
    EMPTY,
    ShardWriter,
    read_entries,
    write_manifest,
)
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.loading.loader import OnceLoader
from wuerstchen_pl.data.ordering.batches import BatchSpec, sequential_batches
from wuerstchen_pl.data.ordering.buckets import Size
from wuerstchen_pl.data.ordering.stream import EpochSample
from wuerstchen_pl.data.sources.source import Sample, Split, name_digest
from wuerstchen_pl.io.atomic import atomic_write, write_text


class Encoders(Protocol):
    """The frozen networks that encode images and captions."""

    def images(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8 -> tensors (B, ...) on the CPU, by name."""

    def captions(self, captions: list[str]) -> Tensor | None:
        """B captions -> (B, L, D) text embeddings on the CPU; None if captions are not cached."""


@dataclass(slots=True)
class EncodedSample:
    """The encoded sample: tensors of each crop, and the text embeddings of its captions."""

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
    """Write the missing files of a cache, and its manifest once no shard is missing.

    A single process also writes the manifest if some shards cannot be read.

    Args:
        data: data module of the images, already set up.
        encoders: the frozen networks.
        folder: cache folder, already claimed.
        settings: contents of the manifest.
        crops: number of crops of each training image, the same as in the first epochs of training.
        shard_mb: approximate size of a file in MB.
        rank: rank of this process, in [0, world_size).
        world_size: number of processes that share the work.

    Returns:
        The missing shards, which cannot be read or are still being encoded by other processes.
    """
    samples_per_file = _samples_per_file(data, encoders, crops, shard_mb)
    units = list(_units(data))
    with tqdm(desc=f"encoding to {folder}", unit=" images", disable=rank > 0) as bar:
        for split, number, shard in units[rank::world_size]:
            record = folder / f"{split}-{number:05d}.json"
            done = _recorded_files(record, shard) is not None
            # With deduplication, finished shards are indexed to know the hashes of their images.
            if done and not data.filters.deduplicate:
                continue
            opened = data.splits.opener.open(shard) if split == "train" else None
            samples = (
                data.splits.first_window["val"]
                if opened is None
                else data.splits.samples_of(opened)
            )
            if done:
                continue
            epochs = list(range(crops)) if split == "train" else [-1]
            names = []
            for part, chunk in enumerate(_chunks(samples, samples_per_file)):
                name = f"{split}-{number:05d}-{part:03d}-{_content_hash(chunk)}.safetensors"
                names.append(name)
                if not (folder / name).is_file():
                    _write(folder / name, chunk, _encode(data, encoders, chunk, epochs, bar))
            # Not recorded if it is unreadable, so that the next run retries it.
            if opened is None or opened.samples or not opened.broken:
                write_text(record, json.dumps({"shard": shard, "files": names}))
    written: list[tuple[str, Split]] = []
    missing: list[str] = []
    for split, number, shard in units:
        files = _recorded_files(folder / f"{split}-{number:05d}.json", shard)
        written += [(name, split) for name in files or ()]
        missing += [shard] if files is None else []
    if not missing or world_size == 1:
        _finish(folder, written, encoders, settings)
    return missing


def _finish(
    folder: Path, written: list[tuple[str, Split]], encoders: Encoders, settings: dict[str, Any]
) -> None:
    """Write the encoded empty caption and the manifest."""
    if not any(split == "train" and read_entries(folder / name) for name, split in written):
        raise ValueError(
            "there is nothing to train on, as no image can be read; see the skipped samples above"
        )
    empty = encoders.captions([""])
    if empty is not None:
        with atomic_write(folder / EMPTY) as partial:
            save_file({"text": empty}, partial)
            partial.chmod(0o644)  # safetensors creates files readable by their owner only
    write_manifest(folder, written, **settings)


Unit = tuple[Split, int, str]  # split, number, and the name that the record must contain


def _units(data: ImageTextDataModule) -> Iterator[Unit]:
    """The units of work: each training shard, and the validation set as a whole."""
    for number, shard in enumerate(data.splits.shards("train")):
        yield "train", number, shard
    yield "val", 0, f"validation {_content_hash(data.splits.first_window['val'])}"


def _content_hash(samples: list[Sample]) -> str:
    return name_digest("\n".join(sample.identity for sample in samples)).hex()[:8]


def _chunks(samples: list[Sample], size: int) -> Iterator[list[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _samples_per_file(
    data: ImageTextDataModule, encoders: Encoders, crops: int, shard_mb: int
) -> int:
    height, width = max(data.sizes, key=lambda size: size[0] * size[1])
    encoded = encoders.images(torch.zeros(1, 3, height, width, dtype=torch.uint8))
    size = crops * sum(tensor.nbytes for tensor in encoded.values())
    embeddings = encoders.captions([""])
    size += 0 if embeddings is None else embeddings.nbytes
    return max(1, shard_mb * 1_000_000 // size)


def _encode(
    data: ImageTextDataModule,
    encoders: Encoders,
    samples: list[Sample],
    epochs: list[int],
    bar: tqdm,
) -> list[EncodedSample]:
    """Encode the samples of one file; an unreadable sample has no crops."""
    encoded = [EncodedSample() for _ in samples]
    numbers = {id(sample): number for number, sample in enumerate(samples)}
    specs = [
        BatchSpec(spec.size, tuple(EpochSample(row.sample, epoch) for row in spec.rows), None)
        for epoch in epochs
        for spec in sequential_batches(
            samples, data.buckets, batch_size=data.batch_size, rank=0, world_size=1
        )
    ]
    loader = OnceLoader(data.dataset(), specs, stats=data.splits.stats, **data.loader_options())
    for spec, (batch, report) in zip(specs, loader.with_reports(), strict=True):
        bar.update(len(spec.rows))
        if not report.rows:
            continue
        tensors = encoders.images(batch["image"])
        batch_numbers = [numbers[id(spec.rows[row].sample)] for row in report.rows]
        for row, number in enumerate(batch_numbers):
            encoded[number].size = spec.size
            encoded[number].crops.append({k: t[row : row + 1] for k, t in tensors.items()})
        without_text = [number for number in batch_numbers if encoded[number].text is None]
        _add_text(encoders, without_text, samples, encoded)
    for result in encoded:
        if len(result.crops) < len(epochs):  # readable only intermittently: all crops are required
            result.crops = []
    return encoded


def _add_text(
    encoders: Encoders, numbers: list[int], samples: list[Sample], encoded: list[EncodedSample]
) -> None:
    """Encode all captions of the samples ``numbers`` in one batch."""
    captions = [caption for number in numbers for caption in samples[number].captions]
    embeddings = encoders.captions(captions) if captions else None
    if embeddings is None:
        return
    lengths = [len(samples[number].captions) for number in numbers]
    for number, text in zip(numbers, embeddings.split(lengths), strict=True):
        encoded[number].text = text


def _write(path: Path, samples: list[Sample], encoded: list[EncodedSample]) -> None:
    """Write one file, in the order of the samples, without unreadable ones."""
    writer = ShardWriter(path)
    for sample, result in zip(samples, encoded, strict=True):
        if result.crops:
            tensors = {k: torch.cat([crop[k] for crop in result.crops]) for k in result.crops[0]}
            writer.add(sample, result.size, tensors, result.text)
    writer.write()


def _recorded_files(path: Path, shard: str) -> list[str] | None:
    """The recorded files of a finished shard; None without a record of this shard."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return record["files"] if record.get("shard") == shard else None
