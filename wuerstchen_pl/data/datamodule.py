"""Batches of captioned pictures in aspect buckets.

A batch is a dict, and every batch has one size, its bucket:

    image    (B, 3, H, W) float32 in [0, 1], RGB
    caption  list of B str
    key      list of B str, the samples' names
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wuerstchen_pl.data.buckets import (
    BucketBatches,
    Size,
    bucket_sizes,
    nearest,
    validation_batches,
)
from wuerstchen_pl.data.source import Sample, Source, Split
from wuerstchen_pl.data.transforms import CENTRE, crop, crop_place, decode, resize_to_cover

Batch = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """What a worker needs to know to build one batch."""

    size: Size
    indices: list[int]
    batch: int | None  # its number, which places the crops; None centres them


class Pictures(Dataset[Batch]):
    """Builds the batch that a `Request` asks for.

    Args:
        source: where the bytes come from.
        samples: what the indices of a request count.
        sizes: of each sample's bucket, in the order of `samples`.
        seed: of the crops.
        keep_decoded: keep each picture, resized but not cropped, in this process's memory.
    """

    def __init__(
        self,
        *,
        source: Source,
        samples: list[Sample],
        sizes: list[Size],
        seed: int,
        keep_decoded: bool,
    ) -> None:
        self.source = source
        self.samples = samples
        self.sizes = sizes
        self.seed = seed
        self._kept: dict[int, Tensor] | None = {} if keep_decoded else None

    def __getitem__(self, request: Request) -> Batch:
        height, width = request.size
        image = torch.empty(len(request.indices), 3, height, width, dtype=torch.uint8)
        for row, index in enumerate(request.indices):
            place = CENTRE
            if request.batch is not None:
                place = crop_place(self.seed, request.batch, index)
            image[row] = crop(self._picture(index), height, width, place)
        chosen = [self.samples[index] for index in request.indices]
        return {
            "image": image.float().div_(255),
            "caption": [sample.caption for sample in chosen],
            "key": [sample.key for sample in chosen],
        }

    def _picture(self, index: int) -> Tensor:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        sample = self.samples[index]
        try:
            img = decode(self.source.read(sample))
        except OSError as error:
            raise ValueError(
                f"sample {sample.key!r} of {sample.shard} is not a readable picture ({error}): "
                "take it out of the shard."
            ) from error
        picture = resize_to_cover(img, *self.sizes[index])
        if self._kept is not None:
            self._kept[index] = picture
        return picture


class Window:
    """A sampler: the requests of batches [start, stop) of an endless order."""

    def __init__(self, order: BucketBatches) -> None:
        self.order = order
        self.start = 0
        self.stop = 0

    def __iter__(self) -> Iterator[Request]:
        batches = islice(self.order.batches(self.start), self.stop - self.start)
        for number, (size, indices) in enumerate(batches, start=self.start):
            yield Request(size, indices, number)


class ResumableLoader(DataLoader[Batch]):
    """A loader whose state is the number of batches it has delivered.

    Each iteration runs to the end of the epoch that this number lies in. Lightning stores the state
    of rank 0 only, which serves every rank and any number of workers. With another batch size or
    number of processes the count means another place: such a run continues, but not exactly.
    """

    def __init__(self, dataset: Pictures, order: BucketBatches, **options: Any) -> None:
        self.window = Window(order)
        self.steps_per_epoch = order.steps_per_epoch
        self.delivered = 0
        super().__init__(dataset, batch_size=None, sampler=self.window, **options)

    def __len__(self) -> int:
        # Always that of a whole epoch; without it Lightning saves the state one batch too late.
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # Nothing happens before the first batch is asked for: Lightning makes iterators early.
        self.window.start = self.delivered
        self.window.stop = (self.delivered // len(self) + 1) * len(self)
        for batch in super().__iter__():
            self.delivered += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return {"batches": how many this loader has delivered since training began}."""
        return {"batches": self.delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that `state` counts."""
        self.delivered = state["batches"]


class ImageTextDataModule(L.LightningDataModule):
    """Training and validation batches of a source, bucketed by aspect ratio.

    The Trainer needs `use_distributed_sampler=False`: ranks are told apart here.

    Args:
        source: the captioned pictures.
        image_size: side in pixels of the square that every batch has about the area of.
        batch_size: samples of one training batch of one process.
        val_batch_size: the same for validation; None takes batch_size.
        num_workers: processes that decode; 0 decodes in the training process.
        seed: of the order and the crops.
        bucket_multiple: both sides of a batch are multiples of this many pixels.
        ratios: width / height of the buckets; None takes the usual ones from 1:2 to 2:1.
        keep_decoded: keep each picture, resized, in the memory of each process that decodes it:
            3 bytes a pixel and sample. For sets of a few thousand small pictures.
    """

    def __init__(
        self,
        *,
        source: Source,
        image_size: int,
        batch_size: int,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        bucket_multiple: int = 32,
        ratios: Sequence[float] | None = None,
        keep_decoded: bool = False,
    ) -> None:
        super().__init__()
        for key, value in (("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"data.{key} is {value}: give 1 or more.")
        if num_workers < 0:
            raise ValueError(f"data.num_workers is {num_workers}: give 0 or more.")
        self.source = source
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.keep_decoded = keep_decoded
        self._sizes = bucket_sizes(image_size, bucket_multiple, ratios)
        self._pictures: dict[Split, Pictures] = {}
        self._loader: ResumableLoader | None = None
        self._resume_from: dict[str, int] | None = None

    @property
    def sizes(self) -> list[Size]:
        """The (height, width) that batches may have, known before any data is read."""
        return list(self._sizes)

    def prepare_data(self) -> None:
        """Make the source ready on disk."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """List the samples and give each its bucket, once."""
        for split in ("train", "val"):
            if split not in self._pictures:
                samples = self.source.samples(split)
                self._pictures[split] = Pictures(
                    source=self.source,
                    samples=samples,
                    sizes=[nearest(s.width, s.height, self._sizes) for s in samples],
                    seed=self.seed,
                    keep_decoded=self.keep_decoded,
                )

    def train_dataloader(self) -> ResumableLoader:
        """Return the endless order of the training split, cut into epochs of equal length."""
        pictures = self._pictures["train"]
        rank, world_size = _place()
        order = BucketBatches(
            buckets=_buckets(pictures),
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        self._loader = ResumableLoader(pictures, order, **self._options())
        if self._resume_from is not None:
            self._loader.load_state_dict(self._resume_from)
            self._resume_from = None
        return self._loader

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return every sample of the validation split once."""
        return self.in_order("val")

    def in_order(self, split: Split) -> DataLoader[Batch]:
        """Return every sample of a split once, in a fixed order, cropped centrally."""
        pictures = self._pictures[split]
        batches = validation_batches(_buckets(pictures), self.val_batch_size, *_place())
        requests = [Request(size, indices, None) for size, indices in batches]
        return DataLoader(pictures, batch_size=None, sampler=requests, **self._options())

    def state_dict(self) -> dict[str, int]:
        """Return the training loader's state.

        Lightning stores the loader's own state too, but does not restore that one from a checkpoint
        which was saved at the end of an epoch: the data would begin anew.
        """
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next training loader continue where `state` was taken."""
        self._resume_from = dict(state)

    def _options(self) -> dict[str, Any]:
        # Workers that persist keep what keep_decoded holds, and their open shards.
        # Their own generator, as a loader draws a number at every epoch from the global one else.
        return {
            "generator": torch.Generator().manual_seed(self.seed),
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def _buckets(pictures: Pictures) -> dict[Size, list[int]]:
    buckets: dict[Size, list[int]] = defaultdict(list)
    for index, size in enumerate(pictures.sizes):
        buckets[size].append(index)
    return dict(buckets)


def _place() -> tuple[int, int]:
    """Return (rank, number of processes)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
