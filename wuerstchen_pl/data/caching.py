"""Makes a cache: every picture and caption through frozen networks once, shard by shard.

A shard of the source becomes some files of the cache, and then a note that it is done: what a run
that was stopped finds so, it does not do again. Several processes each take a share of the shards.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from wuerstchen_pl.data.batches import Request, in_order
from wuerstchen_pl.data.buckets import Size
from wuerstchen_pl.data.cached import EMPTY, ShardWriter, write_manifest
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.loader import OnceLoader
from wuerstchen_pl.data.source import Sample, Split
from wuerstchen_pl.data.stream import Drawn

_SETTINGS = ".settings.json"


class Encoders(Protocol):
    """The frozen networks."""

    def images(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [0, 1] -> tensors (B, ...) on the CPU, by name."""

    def captions(self, captions: list[str]) -> Tensor | None:
        """B captions -> (B, L, D) states on the CPU; None where they are not cached."""


@dataclass(slots=True)
class Made:
    """What was made of a sample: one entry for each of its crops, and its captions' states."""

    size: Size
    crops: list[dict[str, Tensor]] = field(default_factory=list)
    text: Tensor | None = None


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder that of a cache with these settings, or make sure that it is.

    Raises:
        ValueError: it holds something else.
    """
    written = json.loads(json.dumps(settings))
    mark = folder / _SETTINGS
    if mark.is_file():
        before = json.loads(mark.read_text("utf-8"))
        other = sorted(k for k in {**before, **written} if before.get(k) != written.get(k))
        if other:
            raise ValueError(
                f"out={str(folder)!r} was begun with {other[0]}={before.get(other[0])!r}, and now "
                f"it is {written.get(other[0])!r}: choose another folder, or delete that one."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"out={str(folder)!r} holds something else: choose a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    partial = mark.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(written), "utf-8")
    os.replace(partial, mark)


def make(
    data: ImageTextDataModule,
    encoders: Encoders,
    folder: Path,
    *,
    settings: dict[str, Any],
    crops: int,
    shard_mb: int,
    rank: int = 0,
    world_size: int = 1,
) -> bool:
    """Write what is missing of a cache, and its manifest when nothing is.

    Args:
        data: whose pictures; set up.
        encoders: what they go through.
        folder: of the cache, claimed.
        settings: go into the manifest.
        crops: of each training picture: those that training would see in its first passes.
        shard_mb: size of a file, about.
        rank: of this process, in [0, world_size).
        world_size: number of processes that share the work.

    Returns:
        Whether the cache is whole: with several processes the last one to end finds it so.
    """
    count = _samples_per_file(data, encoders, crops, shard_mb)
    units = list(_units(data))
    with tqdm(desc=f"encoding to {folder}", unit="picture", disable=rank > 0) as bar:
        for split, number, shard in units[rank::world_size]:
            note = folder / f"{split}-{number:05d}.json"
            if not note.is_file():
                names = []
                for part, samples in enumerate(_parts(_samples(data, shard), count)):
                    name = f"{split}-{number:05d}-{part:03d}.safetensors"
                    names.append(name)
                    if not (folder / name).is_file():
                        turns = range(crops) if split == "train" else [-1]
                        _write(folder / name, _made(data, encoders, samples, turns, bar), samples)
                _note(note, names)
    notes = [(split, folder / f"{split}-{number:05d}.json") for split, number, _ in units]
    if not all(note.is_file() for _, note in notes):
        return False
    empty = encoders.captions([""])
    if empty is not None:
        save_file({"text": empty}, folder / EMPTY)
    written = [(n, split) for split, note in notes for n in json.loads(note.read_text("utf-8"))]
    if not any(split == "train" for _, split in written):
        raise ValueError(f"nothing is left to train on ({data.splits.ledger.summary()}).")
    write_manifest(folder, written, **settings)
    return True


def _units(data: ImageTextDataModule) -> Iterator[tuple[Split, int, str | None]]:
    """Name what is done at a time: each shard for training, and validation as a whole."""
    for number, shard in enumerate(data.splits.shards("train")):
        yield "train", number, shard
    yield "val", 0, None


def _samples(data: ImageTextDataModule, shard: str | None) -> list[Sample]:
    return data.splits.first["val"] if shard is None else data.splits.samples_of(shard)


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
    turns: range | list[int],
    bar: tqdm,
) -> dict[str, Made]:
    """Put the samples of one file through the networks; what cannot be read is missing."""
    by_key = {sample.key: sample for sample in samples}
    found: dict[str, Made] = {}
    requests = [
        Request(request.size, tuple(Drawn(row.sample, turn) for row in request.rows), None)
        for turn in turns
        for request in in_order(
            samples, data.buckets, batch_size=data.batch_size, rank=0, world_size=1
        )
    ]
    loader = OnceLoader(
        data.dataset(), requests, ledger=data.splits.ledger, **data.loader_options()
    )
    for request, batch in zip(requests, loader, strict=True):
        keys = batch["key"]
        bar.update(len(request.rows))
        if not keys:
            continue
        tensors = encoders.images(batch["image"])
        new = [key for key in keys if key not in found]
        for key in new:
            found[key] = Made(request.size)
        for row, key in enumerate(keys):
            found[key].crops.append({n: tensor[row : row + 1] for n, tensor in tensors.items()})
        _add_text(encoders, [by_key[key] for key in new], found)
    return found


def _add_text(encoders: Encoders, samples: list[Sample], found: dict[str, Made]) -> None:
    """Encode all captions of some samples together."""
    captions = [caption for sample in samples for caption in sample.captions]
    states = encoders.captions(captions) if captions else None
    if states is None:
        return
    lengths = [len(sample.captions) for sample in samples]
    for sample, own in zip(samples, states.split(lengths), strict=True):
        found[sample.key].text = own


def _write(path: Path, found: dict[str, Made], samples: list[Sample]) -> None:
    """Write one file, its samples in their order."""
    writer = ShardWriter(path)
    for sample in samples:
        if (made := found.get(sample.key)) is not None:
            tensors = {n: torch.cat([crop[n] for crop in made.crops]) for n in made.crops[0]}
            writer.add(sample, made.size, tensors, made.text)
    writer.write()


def _note(path: Path, names: list[str]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(names), "utf-8")
    os.replace(partial, path)
