"""Training and validation batches of captioned images, bucketed by aspect ratio.

Data flow: ``Source`` -> ``ShardPrefetcher`` opens shards -> ``Stream`` shuffles and filters
samples -> ``Batches`` fills buckets -> ``ImageBatchDataset`` builds the batch of a ``BatchSpec`` in
a worker -> loader. All but the last two handle only metadata, in the main process.
"""

import copy
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from wuerstchen_pl.data.loading.batch_dataset import Batch, BatchReport, ImageBatchDataset
from wuerstchen_pl.data.loading.captions import Captions
from wuerstchen_pl.data.loading.control import check_control_files
from wuerstchen_pl.data.loading.loader import OnceLoader, ResumableLoader, ignore_signals
from wuerstchen_pl.data.loading.masks import MaskSource, check_mask_files
from wuerstchen_pl.data.loading.ranges import check_ranges
from wuerstchen_pl.data.loading.resources import choose_num_workers, cpu_count, fit_in_memory
from wuerstchen_pl.data.loading.transforms import Crop
from wuerstchen_pl.data.ordering.batches import Batches, BatchSpec, sequential_batches
from wuerstchen_pl.data.ordering.buckets import Buckets, Policy, Size
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.splits import Splits
from wuerstchen_pl.data.ordering.stats import DataStats
from wuerstchen_pl.data.ordering.stream import Mixture, Stream
from wuerstchen_pl.data.sources.source import Holdout, Source, Split
from wuerstchen_pl.distributed.launch import DistInfo
from wuerstchen_pl.io.images import to_float

RUNTIME_KEYS = ("batch_size", "val_batch_size", "num_workers", "keep_decoded", "max_bad_fraction")
"""Config keys of the data that do not affect caches or shards built from them."""


class ImageTextDataModule(L.LightningDataModule):
    """Batches of a source; see ``loading/batch_dataset.py`` for their contents.

    The Trainer needs ``use_distributed_sampler=False``: this module splits the data between ranks.

    Args:
        source: the captioned images.
        image_size: side in pixels of the square with about the area of the images of every batch.
        batch_size: training samples per batch and process.
        val_batch_size: the same for validation; None uses batch_size.
        val_fraction: expected share of the samples to hold out for validation, by a hash of their
            names, in [0, 1); for a source without a validation split. If the set does not fit in
            one window, validation uses the held-out samples of the first window.
        num_workers: decoding processes, at most one per CPU; 0 decodes in the training process,
            None takes one for 100 images, up to 8.
        seed: random seed of the order, the crops and the captions.
        buckets: "area", "sizes" or "paper"; see ``Buckets``.
        bucket_multiple: both sides of a batch are multiples of this many pixels.
        ratios: width / height of the buckets of "area"; None uses the defaults, 1:2 to 2:1.
        sizes: [height, width] of the buckets of "sizes".
        max_upscale: images that would be upscaled more are dropped and counted; None keeps all.
        crop: "random", "center", or "saliency", which keeps the strongest edges; validation uses
            center crops.
        crop_share: side of a crop relative to the largest possible one, in (0, 1]; 0.5 crops 128 px
            out of an image that covers 256.
        filters: further filters; None drops nothing.
        captions: what training changes about captions; None changes nothing.
        mask: which masks weight the pixels in the loss, "file" or "alpha"; see ``MaskSource``.
        control: read control images, ``NAME.control.png`` beside each image, for a ControlNet.
        shuffle_samples: minimum number of samples that are shuffled together, the window.
        max_bad_fraction: share of bad samples (of at least 1,000) or bad shards (of at least 20)
            above which the run stops with a summary.
        keep_decoded: cache decoded images, reduced to at most twice the size of their batches, in
            the memory of each decoding process; None does so if all take at most 1 GB.
    """

    def __init__(
        self,
        *,
        source: Source,
        image_size: int,
        batch_size: int,
        val_batch_size: int | None = None,
        val_fraction: float = 0.0,
        num_workers: int | None = 0,
        seed: int = 0,
        buckets: Policy = "area",
        bucket_multiple: int = 32,
        ratios: Sequence[float] | None = None,
        sizes: Sequence[Sequence[int]] | None = None,
        max_upscale: float | None = None,
        crop: Crop = "random",
        crop_share: float = 1.0,
        filters: Filters | None = None,
        captions: Captions | None = None,
        mask: MaskSource | None = None,
        control: bool = False,
        shuffle_samples: int = 20_000,
        max_bad_fraction: float = 0.05,
        keep_decoded: bool | None = False,
    ) -> None:
        super().__init__()
        check_ranges(
            batch_size=batch_size, val_batch_size=val_batch_size, num_workers=num_workers,
            shuffle_samples=shuffle_samples, max_bad_fraction=max_bad_fraction,
            max_upscale=max_upscale, crop_share=crop_share,
        )  # fmt: skip
        Holdout(val_fraction)  # validates the fraction
        self.source = source
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.val_fraction = val_fraction
        self.num_workers = num_workers
        self.seed = seed
        self.buckets = Buckets(
            policy=buckets, image_size=image_size, multiple=bucket_multiple,
            ratios=ratios, sizes=sizes, seed=seed,
        )  # fmt: skip
        # A smaller crop is upscaled by a factor of 1 / crop_share more.
        self.max_upscale = None if max_upscale is None else max_upscale * crop_share
        self.crop: Crop = crop
        self.crop_share = crop_share
        self.captions = captions or Captions()
        self.filters = copy.copy(filters) or Filters()
        if self.captions.of_uncaptioned:
            self.filters.require_caption = False
        self.mask: MaskSource | None = mask
        self.control = control
        self.shuffle_samples = shuffle_samples
        self.max_bad_fraction = max_bad_fraction
        self.keep_decoded = keep_decoded
        self._loader: ResumableLoader | None = None
        self._resume_from: dict[str, Any] | None = None

    @property
    def sizes(self) -> list[Size]:
        """The possible (height, width) of batches, known before any data are read."""
        return list(self.buckets.sizes)

    def prepare_data(self) -> None:
        """Prepare the source on disk."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open the first shards, to determine the held-out set and the length of an epoch."""
        if not hasattr(self, "splits"):
            self.splits = Splits(
                self.source,
                filters=self.filters,
                buckets=self.buckets,
                max_upscale=self.max_upscale,
                val_fraction=self.val_fraction,
                window=self.shuffle_samples,
                max_bad_fraction=self.max_bad_fraction,
            )
        check_mask_files(self.mask, self.splits.first_window["train"])
        if self.control:
            check_control_files([s for w in self.splits.first_window.values() for s in w])
        self.splits.broadcast_from_rank_zero()  # after it was opened before there was a group

    def teardown(self, stage: str | None = None) -> None:
        """Stop the background threads."""
        if hasattr(self, "splits"):
            self.splits.opener.close()

    def train_dataloader(self) -> ResumableLoader:
        """A loader of the endless training order, divided into epochs of equal length."""
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
            try:
                self._loader.load_state_dict(self._resume_from)
            except ValueError as error:
                raise TypeError(f"the position in the data is damaged: {error}") from error
        self._resume_from = None
        return self._loader

    def _batches_per_epoch(self, world_size: int) -> int:
        """A multiple of accumulate_grad_batches, as Lightning steps at the end of an epoch."""
        batches_per_step = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        batches = self.splits.epoch_samples // (self.batch_size * world_size)
        return max(1, batches // batches_per_step) * batches_per_step

    def val_dataloader(self) -> OnceLoader:
        """A loader of every validation sample, each once; warns if there are none."""
        if not self.splits.first_window["val"] and (self.val_fraction or self.source.groups("val")):
            rank_zero_warn("there is no validation sample, so validation is skipped")
        return self.in_order("val")

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The batch of the contract with stages, from a loader's batch on the stage's device.

        Workers send images as bytes, and cached tensors in the type of the cache.
        """
        return {
            name: _to_float32(value) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def in_order(self, split: Split, *, alone: bool = False) -> OnceLoader:
        """A loader of each sample of a split once; of a large split, only the first window.

        Deterministic, with center crops. With ``alone``, this process gets all of them instead of
        its share. Images are uint8; see ``io.images.to_float``.
        """
        specs = self.specs_in_order(split, alone=alone)
        return OnceLoader(self.dataset(), specs, **self.loader_options())

    def specs_in_order(self, split: Split, *, alone: bool = False) -> list[BatchSpec]:
        """The specs of the batches of ``in_order``, without reading an image."""
        rank, world_size = DistInfo() if alone else DistInfo.from_process_group()
        return sequential_batches(
            self.splits.first_window[split],
            self.buckets,
            batch_size=self.val_batch_size,
            rank=rank,
            world_size=world_size,
        )

    @property
    def counts(self) -> dict[str, float]:
        """Counts over all processes, by name; see ``DataStats``."""
        return {} if self._loader is None else self._loader.counts

    def state_dict(self) -> dict[str, Any]:
        """The training loader's state.

        Lightning stores the loader's own state too, but does not restore it from a checkpoint
        saved at the end of an epoch: the data would restart.
        """
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next training loader resume from ``state``."""
        self._resume_from = state

    def dataset(self) -> Dataset[tuple[Batch, BatchReport]]:
        """The dataset that builds batches from batch specs."""
        keep_decoded = self.keep_decoded
        if keep_decoded is None:
            num_images = self.splits.epoch_samples
            keep_decoded = fit_in_memory(num_images, self.sizes, self.crop_share)
        return ImageBatchDataset(
            source=self.source,
            seed=self.seed,
            crop=self.crop,
            keep_decoded=keep_decoded,
            crop_share=self.crop_share,
            captions=self.captions,
            mask=self.mask,
            control=self.control,
        )

    def loader_options(self) -> dict[str, Any]:
        """The options of torch's DataLoader."""
        num_workers = self.num_workers
        if num_workers is None:
            num_workers = choose_num_workers(self.splits.epoch_samples)
        num_workers = min(num_workers, cpu_count())
        # Persistent workers keep their decoded images and open shards. A separate generator, as a
        # loader would otherwise draw from the global one at every epoch.
        return {
            "generator": torch.Generator().manual_seed(self.seed),
            "worker_init_fn": ignore_signals,
            "num_workers": num_workers,
            "persistent_workers": num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def _to_float32(tensor: Tensor) -> Tensor:
    return to_float(tensor) if tensor.dtype == torch.uint8 else tensor.float()
