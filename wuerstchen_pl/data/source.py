"""What a set of captioned pictures looks like to the rest of the package: `Sample` and `Source`."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "val"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One captioned picture, known without decoding it.

    Attributes:
        key: its name, unique within its shard.
        caption: its text.
        width: of the picture as it is stored, in pixels.
        height: of the picture as it is stored, in pixels.
        shard: path of the file that holds the picture's bytes.
        offset: of the first of those bytes.
        size: how many they are.
    """

    key: str
    caption: str
    width: int
    height: int
    shard: str
    offset: int
    size: int


class Source(Protocol):
    """Captioned pictures, split once and for all into training and validation.

    It travels to spawned workers, so it must be picklable. The order of `samples` must be the same
    in every process and run: an index into that list is what the order of batches is made of.
    """

    def prepare(self) -> None:
        """Make the data ready on disk; called in one process per machine; instant when ready."""

    def samples(self, split: Split) -> list[Sample]:
        """List the samples of one split, always in the same order."""

    def read(self, sample: Sample) -> bytes:
        """Return the encoded picture of a sample."""


def validation_names(names: Iterable[str], fraction: float) -> set[str]:
    """Choose which names are for validation, by hash: a name's place never depends on the others.

    With `fraction` above 0 at least one name is chosen, so that a small set still validates.

    Args:
        names: what must not straddle the two splits; duplicates count once.
        fraction: expected share of the names that is chosen, in [0, 1).
    """
    place = {name: _unit_hash(name) for name in names}
    chosen = {name for name, value in place.items() if value < fraction}
    if fraction > 0 and place and not chosen:
        chosen = {min(place, key=lambda name: place[name])}
    return chosen


def check_val_fraction(val_fraction: float) -> None:
    """Raise ValueError unless `val_fraction` lies in [0, 1)."""
    if not 0 <= val_fraction < 1:
        raise ValueError(
            f"data.source.val_fraction is {val_fraction}, but it is the share kept for validation: "
            "give a number from 0 up to, not including, 1."
        )


def _unit_hash(name: str) -> float:
    # sha256 and not hash(), which differs from process to process.
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
