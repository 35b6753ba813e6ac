"""Training and validation batches of a source of captioned images, bucketed by aspect ratio.

The way of the data: `Source` -> `Opener` lists shards -> `Stream` shuffles and filters names ->
`Batches` fills buckets -> workers make `Images` of a `Request` -> loader. Everything but the last
two is names and numbers, in the main process.
"""

import os
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from wuerstchen_pl.data.loading.batch_dataset import ImageBatchDataset
from wuerstchen_pl.data.loading.loader import OnceLoader, ResumableLoader, ignore_stop_signals
from wuerstchen_pl.data.loading.transforms import Crop
from wuerstchen_pl.data.ordering.batches import Batches, sequential_batches
from wuerstchen_pl.data.ordering.buckets import Buckets, Policy, Size
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.splits import Splits
from wuerstchen_pl.data.ordering.stream import DataStats, Mixture, Stream
from wuerstchen_pl.data.sources.source import Holdout, Source, Split
from wuerstchen_pl.distributed.launch import DistInfo

RUNTIME_KEYS = ("batch_size", "val_batch_size", "num_workers", "keep_decoded", "max_bad_fraction")
"""Keys of the data that change nothing in what is made of them."""


class ImageTextDataModule(L.LightningDataModule):
    """Batches of a source; `data/loading/images.py` says what is in one.

    The Trainer needs `use_distributed_sampler=False`: this module splits the data between ranks.

    Args:
        source: the captioned images.
        image_size: side in pixels of the square that every batch has about the area of.
        batch_size: samples of one training batch of one process.
        val_batch_size: the same for validation; None takes batch_size.
        val_fraction: expected share of the samples that validation keeps, by a hash of their names,
            in [0, 1); for a source that has no validation split of its own. Of a set that does not
            fit in a window, validation takes those of the first window.
        num_workers: processes that decode, at most one a CPU; 0 decodes in the training process.
        seed: of the order, the crops and the choice of captions.
        buckets: "area", "sizes" or "paper"; see `Buckets`.
        bucket_multiple: both sides of a batch are multiples of this many pixels.
        ratios: width / height of the buckets of "area"; None takes the usual ones, 1:2 to 2:1.
        sizes: [height, width] of the buckets of "sizes".
        max_upscale: an image that had to be enlarged further is dropped and counted; None enlarges
            whatever there is.
        crop: "random", "center", or "saliency", which keeps the strongest edges; validation crops
            in the center.
        crop_share: of the sides of the greatest crop of an image, in (0, 1]; 0.5 crops 128 px out
            of an image that covers 256.
        filters: what else is dropped; None drops nothing.
        shuffle_samples: least number of samples that are shuffled together, the window.
        max_bad_fraction: share of the samples that may be bad, or of the shards where 20 were
            opened, once 1,000 samples were seen; beyond it the run stops with a summary.
        keep_decoded: keep each image, decoded, in the memory of each process that decodes it: 3
            bytes a pixel and sample. For sets of a few thousand small images.
    """

    def __init__(
        self,
        *,
        source: Source,
        image_size: int,
        batch_size: int,
        val_batch_size: int | None = None,
        val_fraction: float = 0.0,
        num_workers: int = 0,
        seed: int = 0,
        buckets: Policy = "area",
        bucket_multiple: int = 32,
        ratios: Sequence[float] | None = None,
        sizes: Sequence[Sequence[int]] | None = None,
        max_upscale: float | None = None,
        crop: Crop = "random",
        crop_share: float = 1.0,
        filters: Filters | None = None,
        shuffle_samples: int = 20_000,
        max_bad_fraction: float = 0.05,
        keep_decoded: bool = False,
    ) -> None:
        super().__init__()
        least = {
            "batch_size": (batch_size, 1),
            "val_batch_size": (val_batch_size, 1),
            "num_workers": (num_workers, 0),
            "shuffle_samples": (shuffle_samples, 1),
            "max_bad_fraction": (max_bad_fraction, 0),
        }
        for key, (value, lowest) in least.items():
            if value is not None and value < lowest:
                raise ValueError(f"data.{key} is {value}: give {lowest} or more.")
        if max_upscale is not None and max_upscale <= 0:
            raise ValueError(f"data.max_upscale is {max_upscale}: give more than 0, or null.")
        if not 0 < crop_share <= 1:
            raise ValueError(f"data.crop_share is {crop_share}: give more than 0, up to 1.")
        Holdout(val_fraction)
        self.source = source
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.val_fraction = val_fraction
        self.num_workers = num_workers
        self.seed = seed
        self.buckets = Buckets(
            policy=buckets,
            image_size=image_size,
            multiple=bucket_multiple,
            ratios=ratios,
            sizes=sizes,
            seed=seed,
        )
        # A part of a crop is enlarged by so much more.
        self.max_upscale = None if max_upscale is None else max_upscale * crop_share
        self.crop: Crop = crop
        self.crop_share = crop_share
        self.filters = filters or Filters()
        self.shuffle_samples = shuffle_samples
        self.max_bad_fraction = max_bad_fraction
        self.keep_decoded = keep_decoded
        self._loader: ResumableLoader | None = None
        self._resume_from: dict[str, Any] | None = None

    @property
    def sizes(self) -> list[Size]:
        """The (height, width) that batches may have, known before any data is read."""
        return list(self.buckets.sizes)

    def prepare_data(self) -> None:
        """Make the source ready on disk."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open the first shards, to know what validation keeps and how long an epoch is."""
        if hasattr(self, "splits"):
            return
        self.splits = Splits(
            self.source,
            filters=self.filters,
            buckets=self.buckets,
            max_upscale=self.max_upscale,
            val_fraction=self.val_fraction,
            window=self.shuffle_samples,
            max_bad_fraction=self.max_bad_fraction,
        )

    def teardown(self, stage: str | None = None) -> None:
        """Stop what happens in the background."""
        if hasattr(self, "splits"):
            self.splits.opener.close()

    def train_dataloader(self) -> ResumableLoader:
        """Return the endless order of the training split, cut into epochs of equal length."""
        rank, world_size = DistInfo.from_process_group()
        stats = DataStats(show=rank == 0, limit=self.max_bad_fraction)
        groups = self.source.groups("train")
        streams = [
            Stream(
                opener=self.splits.opener,
                shards=group.shards,
                seed=self.seed,
                shuffle_samples=self.shuffle_samples,
                filters=self.filters,
                holdout=self.splits.holdout,
                stats=stats,
            )
            for group in groups
        ]
        batches = Batches(
            Mixture(streams, [group.weight for group in groups], seed=self.seed),
            self.buckets,
            batch_size=self.batch_size,
            max_upscale=self.max_upscale,
            rank=rank,
            world_size=world_size,
        )
        self._loader = ResumableLoader(
            self.dataset(),
            batches,
            batches_per_epoch=self._batches_per_epoch(world_size),
            max_bad_fraction=self.max_bad_fraction,
            **self.loader_options(),
        )
        if self._resume_from:
            self._loader.load_state_dict(self._resume_from)
        self._resume_from = None
        return self._loader

    def _batches_per_epoch(self, world_size: int) -> int:
        """Whole steps, as Lightning ends one with the epoch, however few batches it has by then."""
        a_step = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        batches = self.splits.epoch_samples // (self.batch_size * world_size)
        return max(1, batches // a_step) * a_step

    def val_dataloader(self) -> OnceLoader:
        """Return every sample of the validation split once."""
        return self.in_order("val")

    def in_order(self, split: Split, *, alone: bool = False) -> OnceLoader:
        """Return the samples of a split, of a large one those of the first window, each once.

        Always the same, cropped in the center; `alone` takes all, however many processes there are.
        """
        rank, world_size = DistInfo() if alone else DistInfo.from_process_group()
        requests = sequential_batches(
            self.splits.first[split],
            self.buckets,
            batch_size=self.val_batch_size,
            rank=rank,
            world_size=world_size,
        )
        return OnceLoader(self.dataset(), requests, **self.loader_options())

    @property
    def counts(self) -> dict[str, float]:
        """What all processes have seen, dropped, found bad and cropped away; see `DataStats`."""
        return {} if self._loader is None else self._loader.counts

    def state_dict(self) -> dict[str, Any]:
        """Return the training loader's state.

        Lightning stores the loader's own state too, but does not restore that one from a checkpoint
        which was saved at the end of an epoch: the data would start again.
        """
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next training loader continue where `state` was taken."""
        self._resume_from = dict(state)

    def dataset(self) -> Any:
        """Return what builds batches of requests, for a loader."""
        return ImageBatchDataset(
            source=self.source,
            seed=self.seed,
            crop=self.crop,
            keep_decoded=self.keep_decoded,
            crop_share=self.crop_share,
        )

    def loader_options(self) -> dict[str, Any]:
        """Return the options of torch's DataLoader."""
        # Workers that persist keep what keep_decoded holds, and their open shards.
        # Their own generator, as a loader draws a number at every epoch from the global one else.
        return {
            "generator": torch.Generator().manual_seed(self.seed),
            "worker_init_fn": ignore_stop_signals,
            "num_workers": min(self.num_workers, cpu_count()),
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def cpu_count() -> int:
    """The CPUs that this process may use."""
    # not known on every system
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
