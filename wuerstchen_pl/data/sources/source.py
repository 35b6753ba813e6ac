"""The interface of a set of captioned images: ``Sample`` and ``Source``.

A source is a list of shards, and a shard, once opened, a list of samples. A shard is a tar file, or
a range of rows of a folder or table. The full list of samples is never needed at once.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import torch

from wuerstchen_pl.io.image_files import CONTROL_SUFFIX, MASK_SUFFIX, split_suffix

Split = Literal["train", "val"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One captioned image, described without decoding it.

    Attributes:
        key: name, unique within its shard.
        captions: training draws one of them; ``Filters`` decides about samples without a caption.
        width: width in pixels of the stored image, after EXIF orientation.
        height: height in pixels of the stored image, after EXIF orientation.
        shard: name of its shard, as the source lists it.
        offset: byte offset of the image in the shard, or the number of its row.
        size: size of the encoded image in bytes, where known.
        group_key: samples with the same one are in the same split; usually the key.
        metadata: numbers by the names in ``NUMBER_COLUMNS``, and what a source adds.
        mask_offset: byte offset of its mask in the shard.
        mask_size: size of its mask file in bytes; 0 without a mask.
        control_offset: byte offset of its control image in the shard.
        control_size: size of the file of its control image in bytes; 0 without one.
    """

    key: str
    captions: tuple[str, ...]
    width: int
    height: int
    shard: str
    offset: int = 0
    size: int = 0
    group_key: str = ""
    metadata: dict[str, float] = field(default_factory=dict)
    mask_offset: int = 0
    mask_size: int = 0
    control_offset: int = 0
    control_size: int = 0

    @property
    def weight(self) -> float:
        """Weight of its loss in training."""
        return self.metadata.get("weight", 1.0)

    @property
    def name(self) -> str:
        """Shard and key, unique within the source."""
        return f"{self.shard}/{self.key}"

    @property
    def identity(self) -> str:
        """The name without the shard's folder; seeds random choices, so data may be moved."""
        return f"{base_name(self.shard)}/{self.key}"

    @property
    def mask(self) -> "Sample":
        """Its mask, if it has one, as what a source reads like an image."""
        return self._beside(MASK_SUFFIX, self.mask_offset, self.mask_size)

    @property
    def control(self) -> "Sample":
        """Its control image, likewise."""
        return self._beside(CONTROL_SUFFIX, self.control_offset, self.control_size)

    def _beside(self, suffix: str, offset: int, size: int) -> "Sample":
        key = split_suffix(self.key)[0] + suffix  # of a folder; a tar file is read by offset
        return replace(self, key=key, offset=offset, size=size)


IGNORED = frozenset({"hidden file", "additional image", "not in the table"})
"""Reasons of a ``SampleError`` that do not indicate damaged or missing data."""


@dataclass(frozen=True, slots=True)
class SampleError:
    """Something that is not used: the reason, its location and how many samples it affects."""

    reason: str
    where: str
    count: int = 1

    @property
    def is_bad(self) -> bool:
        """Whether data are damaged or missing; what is ignored is only counted."""
        return self.reason not in IGNORED


class UnusableSampleError(Exception):
    """A sample cannot be used; the message is the reason of its ``SampleError``."""


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The contents of a shard.

    Attributes:
        samples: the usable samples, in the shard's order.
        bad: what is not used, with its reasons: unusable, ignored and missing samples.
        broken: whether the shard itself is missing, damaged or truncated.
    """

    samples: list[Sample]
    bad: list[SampleError] = field(default_factory=list)
    broken: bool = False


class ShardGroup(NamedTuple):
    """Shards that are shuffled together, with their sampling weight; a mixture has several."""

    weight: float
    shards: list[str]


class Source(Protocol):
    """Captioned images in shards.

    It is sent to spawned workers, so it must be picklable. Shards and their samples must come in
    the same order in every process and run, as the order of batches is derived from it.
    """

    def prepare(self) -> None:
        """Prepare the data on disk; called in one process per machine; fast if already prepared."""

    def groups(self, split: Split) -> list[ShardGroup]:
        """The shards of a split; empty for "val" if it is held out of "train"."""

    def open(self, shard: str) -> ShardIndex:
        """Index a shard; damage is reported in the result, not raised."""

    def read(self, sample: Sample) -> bytes:
        """The encoded image of a sample.

        Raises:
            OSError: it cannot be read.
        """


def base_name(shard: str) -> str:
    """A shard's name without its folder, so that a run can resume after the data were moved."""
    return shard.rpartition("/")[2]


def name_digest(name: str) -> bytes:
    """The sha256 of a name (32 bytes), the same in every process and run."""
    # Not hash(), which differs between processes. File names need not be UTF-8.
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def unit_hash(name: str) -> float:
    """A hash of a name, in [0, 1)."""
    return int.from_bytes(name_digest(name)[:7]) / 2**56


def permutation(length: int, name: str) -> list[int]:
    """A random permutation of ``length`` items, seeded by ``name``."""
    seed = int.from_bytes(name_digest(name)[:7])
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


class Holdout:
    """The held-out set: samples selected by a hash, independently of one another.

    Args:
        fraction: expected share of the group keys to hold out, in [0, 1).
        group_keys: for each shard group, the group keys of its first shards. If the fraction is
            above 0, at least one of them is held out, unless that would empty a shard group, as
            with a single image.

    Raises:
        ValueError: ``fraction`` is out of range.
    """

    def __init__(self, fraction: float, group_keys: Sequence[Sequence[str]] = ()) -> None:
        if not 0 <= fraction < 1:
            raise ValueError(
                f"val_fraction={fraction} is out of range; use the share of samples to hold "
                "out, at least 0 and less than 1"
            )
        self.threshold = fraction
        if fraction > 0 and group_keys:
            hashes = [[unit_hash(key) for key in keys] for keys in group_keys]
            above_lowest = math.nextafter(min(map(min, hashes)), 1)
            self.threshold = min(max(fraction, above_lowest), *map(max, hashes))

    def __contains__(self, sample: Sample) -> bool:
        return unit_hash(sample.group_key) < self.threshold
