"""What frozen networks make of images and captions, computed once, read instead of them.

A cache is a folder of safetensors files and `cache.json`. A file holds, for each bucket's size,
`<name>/<height>x<width>`: the rows of its samples, as many for each as there are crops; `text`: the
states of their captions; and in its metadata what the samples are. `empty.safetensors` has the
state of the empty caption, so that captions can still be dropped. Batches:

    semantic    (B, S, h, w) float32, of Stage C; or of Stage B:
    latents     (B, C, H/4, W/4) float32, and
    image       (B, 3, H, W) float32 in [0, 1]
    text        (B, L, D) float32, if it was cached, and
    empty_text  (1, L, D) float32
    size        (H, W) in pixels of the images
    caption     list of B str
    key         list of B str
    counts      False if another process has the same samples
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.loading.batch_dataset import Batch, BatchReport, hash_uniforms
from wuerstchen_pl.data.ordering.batches import BatchSpec
from wuerstchen_pl.data.ordering.buckets import Size
from wuerstchen_pl.data.sources.source import Sample, SampleError, ShardGroup, ShardIndex, Split
from wuerstchen_pl.io.atomic import atomic_write, write_text

MANIFEST = "cache.json"
EMPTY = "empty.safetensors"
PREPROCESSING = 1  # raise when images are decoded or cropped otherwise: older caches are stale


class CachedSource:
    """A `Source` over a cache.

    Args:
        root: its folder.

    Raises:
        FileNotFoundError: there is no finished cache.
        ValueError: it was made by another version of the preprocessing.
    """

    def __init__(self, *, root: str) -> None:
        self.root = Path(root).expanduser()
        try:
            self.manifest: dict[str, Any] = json.loads((self.root / MANIFEST).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"data.root={root!r} is not a finished cache, as it has no {MANIFEST}: make it "
                "with python -m wuerstchen_pl.cache, which resumes where it was stopped."
            ) from error
        if self.manifest["preprocessing"] != PREPROCESSING:
            raise ValueError(
                f"data.root={root!r} is stale: its images were decoded and cropped as an older "
                "version did; make it again with python -m wuerstchen_pl.cache."
            )

    @property
    def sizes(self) -> list[Size]:
        """The (height, width) in pixels of the images that it was made of."""
        return [(height, width) for height, width in self.manifest["sizes"]]

    def prepare(self) -> None:
        """Check that the files are there.

        Raises:
            ValueError: one is missing, or cut short.
        """
        for shard in self.manifest["shards"]:
            path = self.root / shard["name"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise ValueError(
                    f"{path} is not the file that {MANIFEST} lists: delete both and run "
                    "python -m wuerstchen_pl.cache again, which makes what is missing."
                )

    def groups(self, split: Split) -> list[ShardGroup]:
        """Name the files of a split."""
        names = [s["name"] for s in self.manifest["shards"] if s["split"] == split]
        return [ShardGroup(1.0, names)] if names else []

    def open(self, shard: str) -> ShardIndex:
        """List the samples of a file."""
        try:
            with safe_open(self.root / shard, framework="pt") as file:
                listed = json.loads((file.metadata() or {})["samples"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            return ShardIndex(
                [], [SampleError("unreadable shard", f"{shard}: {error}")], broken=True
            )
        return ShardIndex(
            [
                Sample(
                    key, tuple(captions), width, height, shard, offset=row, metadata={"text": text}
                )
                for key, captions, width, height, row, text in listed
            ]
        )

    def read(self, sample: Sample) -> bytes:
        """Refuse: a cache holds no encoded images."""
        raise OSError(f"{sample.name} is in a cache, which holds no image files")


class CachedBatchDataset(Dataset[tuple[Batch, BatchReport]]):
    """Builds the batch that a `Request` asks for out of a cache.

    Args:
        source: the cache.
        seed: of the choice of crops and captions.
    """

    def __init__(self, source: CachedSource, seed: int) -> None:
        self.source, self.seed = source, seed
        self.names: list[str] = source.manifest["tensors"]
        self.crops: int = source.manifest["crops"]
        self.has_text = bool(source.manifest["text"])

    def __getitem__(self, request: BatchSpec) -> tuple[Batch, BatchReport]:
        place = f"{request.size[0]}x{request.size[1]}"
        rows: dict[str, list[Tensor]] = {name: [] for name in self.names}
        captions, text = [], []
        for sample, epoch in request.rows:
            file = _opened(str(self.source.root / sample.shard))
            crop, caption = 0, 0
            if epoch >= 0:
                crop, caption = self._choices(sample, epoch)
            for name in self.names:
                row = sample.offset + crop
                rows[name].append(file.get_slice(f"{name}/{place}")[row : row + 1])
            if self.has_text:
                row = int(sample.metadata["text"]) + caption
                text.append(file.get_slice("text")[row : row + 1])
            captions.append(sample.captions[caption])
        batch: Batch = {name: _floats(torch.cat(found)) for name, found in rows.items()}
        if self.has_text:
            batch["text"] = torch.cat(text).float()
            batch["empty_text"] = _empty(str(self.source.root / EMPTY))
        batch |= {"size": request.size, "caption": captions, "is_unique": request.is_unique}
        batch["key"] = [drawn.sample.key for drawn in request.rows]
        return batch, BatchReport()

    def _choices(self, sample: Sample, epoch: int) -> tuple[int, int]:
        """Draw which crop and which caption a pass takes."""
        crop, caption = hash_uniforms(f"{self.seed}/{epoch}/{sample.identity}", 2)
        return int(crop * self.crops), int(caption * len(sample.captions))


class CachedDataModule(ImageTextDataModule):
    """Batches of a cache; the rest see `ImageTextDataModule`.

    Args:
        root: the cache's folder.
        batch_size: samples of one training batch of one process.
        val_batch_size: the same for validation; None takes batch_size.
        num_workers: processes that read.
        seed: of the order, and of the choice of crops and captions.
        shuffle_samples: least number of samples that are shuffled together.
        max_bad_fraction: share of bad samples or shards beyond which the run stops.
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
        shuffle_samples: int = 20_000,
        max_bad_fraction: float = 0.05,
    ) -> None:
        source = CachedSource(root=root)
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
            shuffle_samples=shuffle_samples,
            max_bad_fraction=max_bad_fraction,
        )

    @property
    def made_with(self) -> dict[str, Any]:
        """What the cache depends on, for a stage to compare with what it has."""
        return self.source.manifest["made_with"]

    def dataset(self) -> CachedBatchDataset:
        """Return what reads batches of requests, for a loader."""
        return CachedBatchDataset(self.source, self.seed)


class ShardWriter:
    """Collects what networks make of samples, and writes it as one file, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, list[Tensor]] = {}
        self._text: list[Tensor] = []
        self._samples: list[list[Any]] = []
        self._count: dict[str, int] = {}

    def add(
        self, sample: Sample, size: Size, crops: dict[str, Tensor], text: Tensor | None
    ) -> None:
        """Add a sample.

        Args:
            sample: what it is.
            size: (height, width) of its bucket.
            crops: by name, what was made of each of its crops, (crops, ...).
            text: (captions, L, D) states of its captions.
        """
        place = f"{size[0]}x{size[1]}"
        row = self._count.get(place, 0)
        for name, tensor in crops.items():
            self._rows.setdefault(f"{name}/{place}", []).append(tensor)
            self._count[place] = row + len(tensor)
        first = sum(map(len, self._text))
        self._text += [] if text is None else [text]
        captions = list(sample.captions)
        self._samples.append([sample.key, captions, size[1], size[0], row, first])

    def write(self) -> None:
        """Write the file."""
        tensors = {name: torch.cat(rows).contiguous() for name, rows in self._rows.items()}
        if self._text:
            tensors["text"] = torch.cat(self._text).contiguous()
        with atomic_write(self.path) as partial:
            save_file(tensors, partial, metadata={"samples": json.dumps(self._samples)})
            partial.chmod(0o644)  # safetensors lets nobody else read


def write_manifest(root: Path, names: Sequence[tuple[str, Split]], **metadata: Any) -> None:
    """Write `cache.json`, which says that the cache is whole."""
    shards = [
        {"name": name, "split": split, "bytes": (root / name).stat().st_size}
        for name, split in names
    ]
    write_text(root / MANIFEST, json.dumps({**metadata, "shards": shards}, indent=2) + "\n")


@lru_cache(maxsize=64)
def _opened(path: str) -> Any:
    return safe_open(path, framework="pt")


@lru_cache(maxsize=4)
def _empty(path: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("text").float()


def _floats(tensor: Tensor) -> Tensor:
    """Values as float32; bytes as shares of 255."""
    return tensor.float().div_(255) if tensor.dtype == torch.uint8 else tensor.float()
