"""Loaders: workers build the batches that an order asks for; the order's place is the state."""

import signal
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from wuerstchen_pl.data.loading.batch_dataset import Batch, BatchReport
from wuerstchen_pl.data.ordering.batches import Batches, BatchSpec, Snapshot
from wuerstchen_pl.data.ordering.stream import DataStats
from wuerstchen_pl.distributed.counters import sum_counters


def ignore_stop_signals(worker: int) -> None:
    """Keep a worker running when its process group gets a signal: the run finishes its step first.

    A worker ends with the process that started it.
    """
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)


class BatchSampler:
    """A sampler: requests of an order up to batch `stop`, each with a snapshot of what follows."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.stop = 0
        self.snapshots: deque[Snapshot] = deque()

    def __iter__(self) -> Iterator[BatchSpec]:
        while self.batches.number < self.stop:
            request = next(self.batches)
            self.snapshots.append(self.batches.snapshot())
            yield request


class ResumableLoader(DataLoader[Any]):
    """A loader whose state is the place in the order behind the last batch that it delivered.

    Each iteration runs to the end of the epoch that this place lies in. The state is the same on
    every rank and whatever the number of workers: Lightning stores rank 0's.

    Args:
        dataset: builds batches, with a `Report` each.
        batches: the order.
        batches_per_epoch: length of an epoch; what is left over moves to the next one.
        max_bad_fraction: share of bad samples, or broken shards, above which it stops.
        options: of torch's DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[tuple[Batch, BatchReport]],
        batches: Batches,
        *,
        batches_per_epoch: int,
        max_bad_fraction: float,
        **options: Any,
    ) -> None:
        self.batches, self.plan = batches, BatchSampler(batches)
        self.batches_per_epoch = batches_per_epoch
        self.max_bad_fraction = max_bad_fraction
        self.place = batches.snapshot()
        # What this process's workers counted, after what all had counted before a resume; what
        # the order counts is in `place`.
        self.worker_stats = DataStats()
        self.counts_before: Counter[str] = Counter()
        super().__init__(dataset, batch_size=None, sampler=self.plan, **options)

    def __len__(self) -> int:
        # Always that of a whole epoch; without it Lightning saves the state one batch too late.
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # Nothing happens before the first batch is asked for: Lightning makes iterators early.
        self.batches.restore(self.place)
        self.plan.snapshots.clear()
        self.plan.stop = (self.place.batches // len(self) + 1) * len(self)
        for batch, report in super().__iter__():
            self.place = self.plan.snapshots.popleft()
            self._take_note(report)
            yield batch

    @property
    def counts(self) -> dict[str, float]:
        """What all processes saw, dropped, found bad and cropped away, by name; see `DataStats`.

        Every process has to ask for it.
        """
        return dict(self.place.counts + self._worker_counts())

    def _worker_counts(self) -> Counter[str]:
        return self.counts_before + sum_counters(self.worker_stats.counts)

    def _take_note(self, report: BatchReport) -> None:
        self.worker_stats.counts["pixels"] += round(report.pixels)
        self.worker_stats.counts["pixels/kept"] += round(report.kept)
        for bad in report.bad:
            self.worker_stats.note_bad(bad)
        planned = DataStats(limit=self.max_bad_fraction)
        planned.counts = self.place.counts
        before, own = (_num_bad(c) for c in (self.counts_before, self.worker_stats.counts))
        # the other processes are assumed to find as many as this one: no communication per batch
        planned.check(more_bad=before + own * self.batches.world_size)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the order and the counts, in plain values; on every process."""
        return {**self.batches.state_dict(self.place), "found": dict(self._worker_counts())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.place = self.batches.load_state_dict(state)
        self.worker_stats.counts.clear()
        self.counts_before = Counter(state["found"])


def _num_bad(counts: Counter[str]) -> int:
    return sum(number for name, number in counts.items() if name.startswith("bad/"))


class OnceLoader(DataLoader[Any]):
    """A loader of a list of requests, each time the same.

    Args:
        dataset: builds batches, with a `Report` each.
        requests: one for each batch.
        stats: counts what cannot be read; None makes one.
        options: of torch's DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[tuple[Batch, BatchReport]],
        requests: list[BatchSpec],
        *,
        stats: DataStats | None = None,
        **options: Any,
    ) -> None:
        self.stats = stats or DataStats()
        super().__init__(dataset, batch_size=None, sampler=requests, **options)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch, _ in self.reported():
            yield batch

    def reported(self) -> Iterator[tuple[Batch, BatchReport]]:
        """Yield each batch with what its worker says of it."""
        for batch, report in super().__iter__():
            for bad in report.bad:
                self.stats.note_bad(bad)
            yield batch, report
