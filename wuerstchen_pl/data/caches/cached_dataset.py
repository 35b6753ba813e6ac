"""Reads cached outputs of frozen networks instead of images and captions.

See ``cache_files`` for the files. Batches:

    semantic    (B, S, h, w), for Stage C; or for Stage B:
    latents     (B, C, H/4, W/4), and
    image       (B, 3, H, W) uint8
    text        (B, L, D), if it was cached, and
    empty_text  (1, L, D)
    size        (H, W) in pixels of the images
    caption     list of B str
    key         list of B str
    is_unique   False if another process has the same samples
    weight      (B,) float32, unless all weights are 1

Tensors without a type are of the cache's: bfloat16 or float32.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from wuerstchen_pl.data.caches.cache_files import (
    EMPTY,
    KEYS,
    MANIFEST,
    PREPROCESSING,
    SHARD_KEYS,
    read_entries,
)
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.loading.batch_dataset import Batch, BatchReport, hash_uniforms, weights_of
from wuerstchen_pl.data.loading.captions import Captions
from wuerstchen_pl.data.ordering.batches import BatchSpec
from wuerstchen_pl.data.ordering.buckets import Size
from wuerstchen_pl.data.sources.source import Sample, SampleError, ShardGroup, ShardIndex, Split
from wuerstchen_pl.io.contents import contents_of
from wuerstchen_pl.signatures import check_entries


class CachedSource:
    """A ``Source`` over a cache.

    Args:
        root: the cache folder.

    Raises:
        FileNotFoundError: there is no finished cache.
        ValueError: it was built by another version of the preprocessing.
    """

    def __init__(self, *, root: str) -> None:
        self.root = Path(root).expanduser()
        try:
            self.manifest: dict[str, Any] = json.loads((self.root / MANIFEST).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"root={root!r} is not a finished cache, as it has no valid {MANIFEST}; build "
                "it with python -m wuerstchen_pl.cache, which resumes an interrupted build"
            ) from error
        with contents_of(self.root / MANIFEST, "build the cache again"):
            check_entries(self.manifest, KEYS)
            for number, shard in enumerate(self.manifest["shards"]):
                check_entries(shard, SHARD_KEYS, f"shards[{number}]")
            _ = self.sizes  # pairs
        if self.manifest["preprocessing"] != PREPROCESSING:
            raise ValueError(
                f"root={root!r} is stale, as an older version decoded and cropped its images; "
                "rebuild it with python -m wuerstchen_pl.cache"
            )

    @property
    def sizes(self) -> list[Size]:
        """The bucket sizes (height, width) in pixels of the cached images."""
        return [(height, width) for height, width in self.manifest["sizes"]]

    def prepare(self) -> None:
        """Check that the files exist and have the expected size.

        Raises:
            ValueError: a file is missing or truncated.
        """
        for shard in self.manifest["shards"]:
            path = self.root / shard["name"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise ValueError(
                    f"{path} is not the file that {MANIFEST} lists; delete both and run "
                    "python -m wuerstchen_pl.cache again, which rebuilds missing files"
                )

    def groups(self, split: Split) -> list[ShardGroup]:
        """The files of a split."""
        names = [s["name"] for s in self.manifest["shards"] if s["split"] == split]
        return [ShardGroup(1.0, names)] if names else []

    def open(self, shard: str) -> ShardIndex:
        """Index the samples of a file."""
        try:
            return ShardIndex(self._samples(shard))
        except (OSError, SafetensorError, LookupError, ValueError, TypeError) as error:
            return ShardIndex(
                [], [SampleError("unreadable shard", f"{shard}: {error}")], broken=True
            )

    def _samples(self, shard: str) -> list[Sample]:
        return [
            Sample(
                key,
                tuple(captions),
                width,
                height,
                shard,
                offset=row,
                metadata={"text": text, "weight": weight},
            )
            for key, captions, width, height, row, text, weight in read_entries(self.root / shard)
        ]

    def read(self, sample: Sample) -> bytes:
        """Raise an OSError: a cache contains no encoded images."""
        raise OSError(f"{sample.name} is in a cache, which contains no image files")


class CachedBatchDataset(Dataset[tuple[Batch, BatchReport]]):
    """Builds the batch of a ``BatchSpec`` from a cache.

    Args:
        source: the cache.
        seed: random seed of the choice of crops and captions.
        captions: what training changes about captions; nothing if text embeddings are cached.
    """

    def __init__(self, source: CachedSource, seed: int, captions: Captions) -> None:
        self.source, self.seed, self.captions = source, seed, captions
        self.names: list[str] = source.manifest["tensors"]
        self.crops: int = source.manifest["crops"]
        self.has_text: bool = source.manifest["text"]

    def __getitem__(self, spec: BatchSpec) -> tuple[Batch, BatchReport]:
        bucket = f"{spec.size[0]}x{spec.size[1]}"
        rows: dict[str, list[Tensor]] = {name: [] for name in self.names}
        captions, text = [], []
        for sample, epoch in spec.rows:
            file = _open_cached(str(self.source.root / sample.shard))
            crop, number, caption = self._choices(sample, epoch)
            with contents_of(self.source.root / sample.shard, "build the cache again"):
                for name in self.names:
                    row = sample.offset + crop
                    rows[name].append(file.get_slice(f"{name}/{bucket}")[row : row + 1])
                if self.has_text:
                    row = int(sample.metadata["text"]) + number
                    text.append(file.get_slice("text")[row : row + 1])
            captions.append(caption)
        batch: Batch = {name: torch.cat(tensors) for name, tensors in rows.items()}
        if self.has_text:
            batch["text"] = torch.cat(text)
            batch["empty_text"] = _empty_text(str(self.source.root / EMPTY))
        batch |= {"size": spec.size, "caption": captions, "is_unique": spec.is_unique}
        samples = [epoch_sample.sample for epoch_sample in spec.rows]
        batch |= {"key": [sample.key for sample in samples], **weights_of(samples)}
        return batch, BatchReport()

    def _choices(self, sample: Sample, epoch: int) -> tuple[int, int, str]:
        """The indices of the crop and the caption that are drawn for an epoch, and the caption."""
        if epoch < 0:
            return 0, 0, self.captions.plain(sample.captions[0])
        name = f"{self.seed}/{epoch}/{sample.identity}"
        crop, choice = hash_uniforms(name, 2)
        number = int(choice * len(sample.captions))
        caption = self.captions.augmented(sample.captions[number], name)
        return int(crop * self.crops), number, caption


class CachedDataModule(ImageTextDataModule):
    """Batches of a cache; see also ``ImageTextDataModule``.

    Args:
        root: the cache folder.
        batch_size: training samples per batch and process.
        val_batch_size: the same for validation; None uses batch_size.
        num_workers: number of reader processes.
        seed: random seed of the order and of the choice of crops and captions.
        captions: what training changes about captions; None changes nothing.
        shuffle_samples: minimum number of samples that are shuffled together.
        max_bad_fraction: share of bad samples or shards above which the run stops.

    Raises:
        ValueError: ``captions`` changes captions whose text embeddings are cached.
    """

    source: CachedSource

    def __init__(
        self,
        *,
        root: str,
        batch_size: int,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        captions: Captions | None = None,
        shuffle_samples: int = 20_000,
        max_bad_fraction: float = 0.05,
    ) -> None:
        source = CachedSource(root=root)
        if captions is not None and source.manifest["text"]:
            for key, value in captions.changes.items():
                raise ValueError(
                    f"captions.{key}={value!r} cannot change the cached text embeddings of "
                    f"root={root!r}; remove it, or build the cache with text=false"
                )
        super().__init__(
            source=source,
            image_size=1,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
            buckets="sizes",
            bucket_multiple=1,
            sizes=source.sizes,
            captions=captions,
            shuffle_samples=shuffle_samples,
            max_bad_fraction=max_bad_fraction,
        )

    @property
    def made_with(self) -> dict[str, Any]:
        """Fingerprints of what the cache was built with, for a stage to compare with its own."""
        return self.source.manifest["made_with"]

    def dataset(self) -> CachedBatchDataset:
        """The dataset that builds batches from batch specs."""
        return CachedBatchDataset(self.source, self.seed, self.captions)


@lru_cache(maxsize=64)
def _open_cached(path: str) -> Any:
    return safe_open(path, framework="pt")


@lru_cache(maxsize=4)
def _empty_text(path: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("text")
