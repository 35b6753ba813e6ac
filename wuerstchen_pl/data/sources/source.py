"""What a set of captioned images looks like to the rest of the package: `Sample` and `Source`.

A source is a list of shards, and a shard, once opened, a list of samples. A tar file is a shard; so
is a stretch of a folder or of a table. Nothing needs to know all samples at once.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch

Split = Literal["train", "val"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One captioned image, known without decoding it.

    Attributes:
        key: its name, unique within its shard.
        captions: its texts, at least one; training draws one of them.
        width: of the image as it is stored, upright, in pixels.
        height: of the image as it is stored, upright, in pixels.
        shard: name of its shard, as the source lists it.
        offset: where in the shard the image's bytes begin, or the number of its row.
        size: how many bytes they are, where the shard is a file that holds many.
        group_key: what must not straddle training and validation; the key, if nothing else.
        metadata: what metadata say of it, by the names in FACTS.
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

    @property
    def name(self) -> str:
        """Its shard and key: what no other sample has."""
        return f"{self.shard}/{self.key}"

    @property
    def identity(self) -> str:
        """The same without the folder that its shard lies in: chance is made of it."""
        return f"{base_name(self.shard)}/{self.key}"


@dataclass(frozen=True, slots=True)
class SampleError:
    """Something that cannot be used, and is counted."""

    reason: str
    where: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """What a shard holds.

    Attributes:
        samples: the complete ones, in the shard's order.
        bad: what else was there, or should have been.
        broken: whether the shard as a whole is absent, damaged or cut short.
    """

    samples: list[Sample]
    bad: list[SampleError] = field(default_factory=list)
    broken: bool = False


class ShardGroup(NamedTuple):
    """Shards that are shuffled together; a mixture has several groups."""

    weight: float
    shards: list[str]


class Source(Protocol):
    """Captioned images in shards.

    It travels to spawned workers, so it must be picklable. Shards and their samples come in the
    same order in every process and run: the order of batches is made of that.
    """

    def prepare(self) -> None:
        """Make the data ready on disk; called in one process per machine; instant when ready."""

    def groups(self, split: Split) -> list[ShardGroup]:
        """Name the shards of a split; none for "val" if that is held out of "train"."""

    def open(self, shard: str) -> ShardIndex:
        """List what a shard holds; does not raise for what is damaged, but reports it."""

    def read(self, sample: Sample) -> bytes:
        """Return the encoded image of a sample.

        Raises:
            OSError: it is not there, or not any more.
        """


def base_name(shard: str) -> str:
    """A shard's name without the folder, so that data may move between a run and its resumption."""
    return shard.rpartition("/")[2]


def name_digest(name: str) -> bytes:
    """32 bytes that are a function of a name, the same in every process and run."""
    # not hash(), which differs from process to process; names of files need not be UTF-8
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def unit_hash(name: str) -> float:
    """Map a name to [0, 1)."""
    return int.from_bytes(name_digest(name)[:7]) / 2**56


def permutation(length: int, name: str) -> list[int]:
    """Return a random order of `length` items, a function of `name`."""
    seed = int.from_bytes(name_digest(name)[:7])
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


class Holdout:
    """Which samples validation keeps for itself: by hash, so that a place never depends on others.

    Args:
        fraction: expected share of the group_keys that is kept, in [0, 1).
        group_keys: of the first shards; one of them is kept if the fraction is above 0 but chooses
            none, so that a small set still validates.

    Raises:
        ValueError: `fraction` is out of its range.
    """

    def __init__(self, fraction: float, group_keys: Sequence[str] = ()) -> None:
        if not 0 <= fraction < 1:
            raise ValueError(
                f"data.val_fraction is {fraction}, but it is the share kept for validation: "
                "give a number from 0 up to, not including, 1."
            )
        self.fraction = fraction
        self.extra: str | None = None
        if fraction > 0 and group_keys and not any(unit_hash(f) < fraction for f in group_keys):
            self.extra = min(group_keys, key=unit_hash)

    def __contains__(self, sample: Sample) -> bool:
        return sample.group_key == self.extra or unit_hash(sample.group_key) < self.fraction
