"""From the endless order of samples to an endless order of batches, one size each.

Samples wait in their bucket until it holds a batch for all processes, of which each takes its part.
So every process takes the same steps whatever the buckets, nothing is lost, and what a pass leaves
in a bucket opens a batch of the next one. Only names move here; workers read the images.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from wuerstchen_pl.data.ordering.buckets import Buckets, Size
from wuerstchen_pl.data.ordering.stream import EpochSample, Mixture, Position
from wuerstchen_pl.data.sources.source import Sample, base_name, name_digest

_NUM_FALLBACKS = 16  # samples that a batch without a single readable image may take instead


class BatchSpec(NamedTuple):
    """What a worker needs to know to build one batch.

    Attributes:
        size: (height, width) of its images.
        rows: its samples; a epoch of -1 takes the first caption and the middle of the image.
        fallback: what takes the place of all rows if none is readable; None leaves the batch empty.
        is_unique: False if another process has these rows as well.
    """

    size: Size
    rows: tuple[EpochSample, ...]
    fallback: tuple[EpochSample, ...] | None = ()
    is_unique: bool = True


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where a `Batches` is: before batch number `batches`, in names and numbers alone."""

    batches: int
    drawn: int
    positions: tuple[Position, ...]
    known: tuple[int, ...]
    pending: dict[Size, tuple[EpochSample, ...]]
    counts: Counter[str]


class Batches:
    """The endless order of the training batches of one process.

    Args:
        stream: where the samples come from.
        buckets: the sizes.
        batch_size: samples of one batch of one process.
        max_upscale: an image that had to be enlarged further is dropped; None takes all.
        rank: of this process, in [0, world_size).
        world_size: number of processes that share each batch.

    Raises:
        ValueError: every image is dropped, or a number is out of its range.
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
            raise ValueError(f"data.batch_size is {batch_size}: give 1 or more.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of {world_size} processes: give 0 to world_size - 1.")
        self.stream, self.buckets = stream, buckets
        self.batch_size, self.max_upscale = batch_size, max_upscale
        self.rank, self.world_size = rank, world_size
        self.global_batch = batch_size * world_size
        self.number = 0
        self.stats = stream.streams[0].stats
        self._pending: dict[Size, list[EpochSample]] = {}
        self._last_kept = {id(s): 0 for s in stream.streams}

    def __iter__(self) -> Iterator[BatchSpec]:
        return self

    def __next__(self) -> BatchSpec:
        size = self._full() or self._draw()
        rows, self._pending[size] = (
            self._pending[size][: self.global_batch],
            self._pending[size][self.global_batch :],
        )
        self.number += 1
        own = rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        return BatchSpec(size, tuple(own), tuple(self.stream.last.others(_NUM_FALLBACKS)))

    def _full(self) -> Size | None:
        """Return a bucket that holds a batch: after a resume with fewer processes several may."""
        return next((s for s, of in self._pending.items() if len(of) >= self.global_batch), None)

    def _draw(self) -> Size:
        """Draw until a bucket is full."""
        for drawn in self.stream:
            size = self.buckets.place(drawn.sample, self.number)
            if self.max_upscale and self.buckets.enlargement(drawn.sample) > self.max_upscale:
                self._drop(drawn)
                continue
            self._last_kept[id(self.stream.last)] = drawn.epoch
            waiting = self._pending.setdefault(size, [])
            waiting.append(drawn)
            if len(waiting) >= self.global_batch:
                return size
        raise AssertionError("a stream is endless")

    def _drop(self, drawn: EpochSample) -> None:
        self.stats.counts["dropped/max_upscale"] += 1
        if drawn.epoch > self._last_kept[id(self.stream.last)] + 1:
            raise ValueError(
                f"data.max_upscale={self.max_upscale} drops every image "
                f"({self.stats.summary()}): raise it, or lower image_size."
            )

    # Where it is

    def snapshot(self) -> Snapshot:
        """Return where the order is: cheap, as it is taken at every batch."""
        return Snapshot(
            batches=self.number,
            drawn=self.stream.drawn,
            positions=tuple(s.position for s in self.stream.streams),
            known=tuple(len(s.first_with) for s in self.stream.streams),
            pending={size: tuple(of) for size, of in self._pending.items() if of},
            counts=self.stats.counts.copy(),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go to where a snapshot was taken; opens one window of each stream, unless it is there."""
        self.number, self.stream.drawn = snapshot.batches, snapshot.drawn
        self._pending = {size: list(of) for size, of in snapshot.pending.items()}
        for stream, position, known in zip(
            self.stream.streams, snapshot.positions, snapshot.known, strict=True
        ):
            for image in list(stream.first_with)[known:]:
                del stream.first_with[image]
            stream.seek(position)
            self._last_kept[id(stream)] = position.epoch
        self.stats.counts = snapshot.counts.copy()

    def state_dict(self, snapshot: Snapshot) -> dict[str, Any]:
        """Write a snapshot in plain values, the same on every rank, for a checkpoint."""
        places = {
            shard: (number, place)
            for number, stream in enumerate(self.stream.streams)
            for place, shard in enumerate(stream.shards)
        }
        return {
            "samples": snapshot.batches * self.global_batch,
            "global_batch": self.global_batch,
            "drawn": snapshot.drawn,
            "positions": [list(position) for position in snapshot.positions],
            "shards": self._shards(),
            "known": [
                list(s.first_with.items())[:known]
                for s, known in zip(self.stream.streams, snapshot.known, strict=True)
            ],
            "pending": [
                [list(size), [[*places[row.sample.shard], *_packed(row)] for row in of]]
                for size, of in snapshot.pending.items()
            ],
            "counts": dict(snapshot.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Snapshot:
        """Read a snapshot back, whatever the number of processes is now.

        If shards were added or removed since, the epoch restarts, with a warning.
        """
        positions = [Position(*position) for position in state["positions"]]
        if state["shards"] != self._shards():
            warnings.warn(
                "the shards are others than those of the checkpoint: its pass over the data begins "
                "again",
                stacklevel=2,
            )
            last = max((position.epoch for position in positions), default=0)
            positions = [Position(epoch=last)] * len(self.stream.streams)
            state = {**state, "pending": [], "known": [[] for _ in positions]}
        for stream, pairs in zip(self.stream.streams, state["known"], strict=True):
            stream.first_with = dict(map(tuple, pairs))
        if state["global_batch"] != self.global_batch:
            warnings.warn(
                f"the checkpoint was made with {state['global_batch']} samples a step, all "
                f"processes together, and now they are {self.global_batch}: samples continue in "
                "their order, batches in another",
                stacklevel=2,
            )
        return Snapshot(
            batches=state["samples"] // self.global_batch,
            drawn=state["drawn"],
            positions=tuple(positions),
            known=tuple(len(s.first_with) for s in self.stream.streams),
            pending=self._found_again(state["pending"]),
            counts=Counter(state["counts"]),
        )

    def _shards(self) -> list[str]:
        """What tells whether the shards are those of a checkpoint, wherever they lie now."""
        return [
            name_digest("\n".join(map(base_name, stream.shards))).hex()[:16]
            for stream in self.stream.streams
        ]

    def _found_again(self, pending: list[Any]) -> dict[Size, tuple[EpochSample, ...]]:
        """Read samples back, checked against our shards and sizes: checkpoints are untrusted."""
        found: dict[Size, list[EpochSample]] = {}
        for (height, width), rows in pending:
            for stream, number, epoch, key, captions, (wide, high), rest in rows:
                shard = self.stream.streams[stream].shards[number]
                drawn = EpochSample(Sample(key, tuple(captions), wide, high, shard, *rest), epoch)
                size = height, width
                if size not in self.buckets.sizes:  # image_size or buckets are others now
                    size = self.buckets.place(drawn.sample, self.number)
                found.setdefault(size, []).append(drawn)
        return {size: tuple(of) for size, of in found.items()}


def sequential_batches(
    samples: Sequence[Sample], buckets: Buckets, *, batch_size: int, rank: int, world_size: int
) -> list[BatchSpec]:
    """List requests so that each sample comes exactly once, unshuffled; the fullest bucket first.

    The last batch of a bucket may be smaller. With several ranks a batch is dealt out in epochs; a
    rank that would get nothing repeats its first sample, which does not count, as ranks must take
    equally many steps.
    """
    waiting: dict[Size, list[EpochSample]] = {}
    for number, sample in enumerate(samples):
        size = buckets.place(sample, number // (batch_size * world_size))
        waiting.setdefault(size, []).append(EpochSample(sample, -1))
    found = []
    fallback = tuple(EpochSample(sample, -1) for sample in samples[:_NUM_FALLBACKS])
    for size, rows in sorted(waiting.items(), key=lambda bucket: (-len(bucket[1]), bucket[0])):
        for start in range(0, len(rows), batch_size * world_size):
            chunk = rows[start : start + batch_size * world_size]
            own = chunk[rank::world_size]
            found.append(BatchSpec(size, tuple(own or chunk[:1]), fallback, is_unique=bool(own)))
    return found


def _packed(drawn: EpochSample) -> list[Any]:
    s = drawn.sample
    rest = [s.offset, s.size, s.group_key, dict(s.metadata)]
    return [drawn.epoch, s.key, list(s.captions), [s.width, s.height], rest]
