"""Groups the endless stream of samples into an endless sequence of batches, of one size each.

Samples wait in their bucket until it contains a global batch, of which each process takes its part.
So all processes take the same number of steps, no sample is lost, and samples left in a bucket at
the end of an epoch start a batch of the next one. Only metadata is handled here; workers read the
images.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from wuerstchen_pl.data.ordering.buckets import Buckets, Size
from wuerstchen_pl.data.ordering.stream import EpochSample, Mixture, Position
from wuerstchen_pl.data.sources.source import Sample, base_name, name_digest
from wuerstchen_pl.plural import plural

_NUM_FALLBACKS = 16  # substitutes for a batch without a readable image


class BatchSpec(NamedTuple):
    """What a worker needs to build one batch.

    Attributes:
        size: (height, width) of the images.
        rows: samples; epoch -1 means the first caption and a center crop.
        fallback: the first readable one replaces the rows if none of them is readable; None
            allows an empty batch.
        is_unique: False if another process has the same rows.
    """

    size: Size
    rows: tuple[EpochSample, ...]
    fallback: tuple[EpochSample, ...] | None = ()
    is_unique: bool = True


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a ``Batches`` before batch number ``batches``."""

    batches: int
    drawn: int
    positions: tuple[Position, ...]
    num_hashes: tuple[int, ...]
    pending: dict[Size, tuple[EpochSample, ...]]
    counts: Counter[str]


class Batches:
    """The endless sequence of training batches of one process.

    Args:
        stream: the endless order of samples.
        buckets: the possible sizes of batches.
        batch_size: samples per batch and process.
        max_upscale: images that would be upscaled more are dropped; None keeps all.
        rank: rank of this process, in [0, world_size).
        world_size: number of processes that share each global batch.

    Raises:
        ValueError: every image is dropped, or an argument is out of range.
    """

    def __init__(
        self,
        stream: Mixture,
        buckets: Buckets,
        *,
        batch_size: int,
        max_upscale: float | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is out of range; use 1 or more")
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank={rank} of {world_size} processes is out of range; use 0 to world_size - 1"
            )
        self.stream, self.buckets = stream, buckets
        self.batch_size, self.max_upscale = batch_size, max_upscale
        self.rank, self.world_size = rank, world_size
        self.global_batch = batch_size * world_size
        self.number = 0
        self.stats = stream.streams[0].stats
        self._pending: dict[Size, list[EpochSample]] = {}
        # Epoch of the last sample kept from each stream.
        self._last_kept = {id(s): 0 for s in stream.streams}

    def __iter__(self) -> Iterator[BatchSpec]:
        return self

    def __next__(self) -> BatchSpec:
        size = self._full_bucket() or self._fill_bucket()
        rows, self._pending[size] = (
            self._pending[size][: self.global_batch],
            self._pending[size][self.global_batch :],
        )
        self.number += 1
        local_rows = rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        fallback = self.stream.last.other_samples(_NUM_FALLBACKS)
        return BatchSpec(size, tuple(local_rows), tuple(fallback))

    def _full_bucket(self) -> Size | None:
        """A full bucket; after a resume with fewer processes there may be several."""
        return next(
            (size for size, rows in self._pending.items() if len(rows) >= self.global_batch), None
        )

    def _fill_bucket(self) -> Size:
        """Draw samples until a bucket is full; return its size."""
        for row in self.stream:
            size = self.buckets.assign(row.sample, self.number)
            if self.max_upscale and self.buckets.enlargement(row.sample) > self.max_upscale:
                self._drop(row)
                continue
            self._last_kept[id(self.stream.last)] = row.epoch
            waiting = self._pending.setdefault(size, [])
            waiting.append(row)
            if len(waiting) >= self.global_batch:
                return size
        raise AssertionError("a stream is endless")

    def _drop(self, row: EpochSample) -> None:
        self.stats.counts["dropped/max_upscale"] += 1
        if row.epoch > self._last_kept[id(self.stream.last)] + 1:
            raise ValueError(
                f"data.max_upscale={self.max_upscale} drops every image "
                f"({self.stats.summary()}); raise it, or lower data.image_size"
            )

    # State

    def snapshot(self) -> Snapshot:
        """The current state; cheap enough to call at every batch."""
        return Snapshot(
            batches=self.number,
            drawn=self.stream.drawn,
            positions=tuple(s.position for s in self.stream.streams),
            num_hashes=tuple(len(s.selector.first_by_hash) for s in self.stream.streams),
            pending={size: tuple(rows) for size, rows in self._pending.items() if rows},
            counts=self.stats.counts.copy(),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Restore a snapshot; opens at most one window of each stream."""
        self.number, self.stream.drawn = snapshot.batches, snapshot.drawn
        self._pending = {size: list(rows) for size, rows in snapshot.pending.items()}
        for stream, position, num_hashes in zip(
            self.stream.streams, snapshot.positions, snapshot.num_hashes, strict=True
        ):
            for image_hash in list(stream.selector.first_by_hash)[num_hashes:]:
                del stream.selector.first_by_hash[image_hash]
            stream.seek(position)
            self._last_kept[id(stream)] = position.epoch
        self.stats.restore(snapshot.counts)

    def state_dict(self, snapshot: Snapshot) -> dict[str, Any]:
        """A snapshot as plain values for a checkpoint, the same on every rank."""
        shard_numbers = {
            shard: (stream_number, number)
            for stream_number, stream in enumerate(self.stream.streams)
            for number, shard in enumerate(stream.shards)
        }
        return {
            "samples": snapshot.batches * self.global_batch,
            "global_batch": self.global_batch,
            "drawn": snapshot.drawn,
            "positions": [list(position) for position in snapshot.positions],
            "shards": self._shard_hashes(),
            "image_hashes": [
                list(stream.selector.first_by_hash.items())[:num_hashes]
                for stream, num_hashes in zip(self.stream.streams, snapshot.num_hashes, strict=True)
            ],
            "pending": [
                [list(size), [[*shard_numbers[row.sample.shard], *_packed(row)] for row in rows]]
                for size, rows in snapshot.pending.items()
            ],
            "counts": dict(snapshot.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Snapshot:
        """Restore the image hashes of a checkpoint, and return its snapshot, for any world size.

        If shards were added or removed, the epoch restarts, with a warning.
        """
        positions = [Position(*position) for position in state["positions"]]
        if state["shards"] != self._shard_hashes():
            warnings.warn(
                "the shards differ from those of the checkpoint; the current epoch restarts",
                stacklevel=2,
            )
            last = max((position.epoch for position in positions), default=0)
            positions = [Position(epoch=last)] * len(self.stream.streams)
            state = {**state, "pending": [], "image_hashes": [[] for _ in positions]}
        for stream, pairs in zip(self.stream.streams, state["image_hashes"], strict=True):
            stream.selector.restore_hashes(map(tuple, pairs))
        if state["global_batch"] != self.global_batch:
            warnings.warn(
                "the checkpoint was made with a global batch of "
                f"{plural(state['global_batch'], 'sample')}, but now it is "
                f"{self.global_batch}; the order of samples continues, but the batches differ",
                stacklevel=2,
            )
        return Snapshot(
            batches=state["samples"] // self.global_batch,
            drawn=state["drawn"],
            positions=tuple(positions),
            num_hashes=tuple(len(s.selector.first_by_hash) for s in self.stream.streams),
            pending=self._restore_pending(state["pending"]),
            counts=Counter(state["counts"]),
        )

    def _shard_hashes(self) -> list[str]:
        """A hash of each stream's shard names, without folders as data may be moved."""
        return [
            name_digest("\n".join(map(base_name, stream.shards))).hex()[:16]
            for stream in self.stream.streams
        ]

    def _restore_pending(self, pending: list[Any]) -> dict[Size, tuple[EpochSample, ...]]:
        """Rebuild pending samples; shard numbers and sizes are checked (untrusted checkpoint)."""
        restored: dict[Size, list[EpochSample]] = {}
        for (height, width), rows in pending:
            for stream, number, epoch, key, captions, (wide, high), rest in rows:
                shard = self.stream.streams[stream].shards[number]
                row = EpochSample(Sample(key, tuple(captions), wide, high, shard, *rest), epoch)
                size = height, width
                if size not in self.buckets.sizes:  # image_size or buckets have changed
                    size = self.buckets.assign(row.sample, self.number)
                restored.setdefault(size, []).append(row)
        return {size: tuple(bucket) for size, bucket in restored.items()}


def sequential_batches(
    samples: Sequence[Sample], buckets: Buckets, *, batch_size: int, rank: int, world_size: int
) -> list[BatchSpec]:
    """Batch specs that cover each sample exactly once, unshuffled; the fullest bucket first.

    The last batch of a bucket may be smaller. Ranks take the rows of a global batch in turn; a rank
    without rows repeats the first one, marked as not unique, as all ranks must take the same number
    of steps.
    """
    waiting: dict[Size, list[EpochSample]] = {}
    for number, sample in enumerate(samples):
        size = buckets.assign(sample, number // (batch_size * world_size))
        waiting.setdefault(size, []).append(EpochSample(sample, -1))
    specs = []
    fallback = tuple(EpochSample(sample, -1) for sample in samples[:_NUM_FALLBACKS])
    for size, rows in sorted(waiting.items(), key=lambda bucket: (-len(bucket[1]), bucket[0])):
        for start in range(0, len(rows), batch_size * world_size):
            chunk = rows[start : start + batch_size * world_size]
            local_rows = chunk[rank::world_size]
            rows_or_repeat = tuple(local_rows or chunk[:1])
            specs.append(BatchSpec(size, rows_or_repeat, fallback, is_unique=bool(local_rows)))
    return specs


def _packed(row: EpochSample) -> list[Any]:
    s = row.sample
    beside = [s.mask_offset, s.mask_size, s.control_offset, s.control_size]
    rest = [s.offset, s.size, s.group_key, dict(s.metadata), *beside]
    return [row.epoch, s.key, list(s.captions), [s.width, s.height], rest]
