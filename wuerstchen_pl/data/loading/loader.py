"""Data loaders: workers build the ordered batches; the position in the order is the state."""

import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from wuerstchen_pl.data.loading.batch_dataset import Batch, BatchReport
from wuerstchen_pl.data.ordering.batches import Batches, BatchSpec, Snapshot
from wuerstchen_pl.data.ordering.stats import DataStats, format_counts
from wuerstchen_pl.distributed.counters import gather, sum_counters

CHECK_EVERY = 20
"""Batches between two checks of the counts of bad data, for which the processes wait for each
other: 2 ms among two processes on CPUs, so less than 1 % of 20 batches of more than 10 ms."""


def ignore_signals(worker: int) -> None:
    """Let a worker survive signals to its process group, so that the run can finish its step.

    A worker exits with the process that started it.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)


class BatchSampler:
    """Yields batch specs up to batch ``stop``; records a snapshot of the order after each."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.stop = 0
        self.snapshots: deque[Snapshot] = deque()

    def begin(self, stop: int) -> None:
        """Start an iteration that ends before batch number ``stop``."""
        self.stop = stop
        self.snapshots.clear()

    def __iter__(self) -> Iterator[BatchSpec]:
        while self.batches.number < self.stop:
            spec = next(self.batches)
            self.snapshots.append(self.batches.snapshot())
            yield spec


class ResumableLoader(DataLoader[Any]):
    """A loader whose state is the position in the order after the last batch that it yielded.

    Each iteration runs to the end of the current epoch. The state is the same on every rank and for
    any number of workers: Lightning stores that of rank 0.

    Args:
        dataset: builds each batch and its ``BatchReport``.
        batches: the endless order of batches.
        batches_per_epoch: length of an epoch; remaining samples move to the next one.
        max_bad_fraction: share of bad samples, or broken shards, above which an error is raised.
        options: options of torch's DataLoader.
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
        self.batches, self.specs = batches, BatchSampler(batches)
        self.batches_per_epoch = batches_per_epoch
        self.max_bad_fraction = max_bad_fraction
        self.position = batches.snapshot()
        # Counts of this process's workers, and those of all processes before a resume. The counts
        # of the order are in ``position``.
        self.worker_stats = DataStats()
        self.counts_before: Counter[str] = Counter()
        super().__init__(dataset, batch_size=None, sampler=self.specs, **options)

    def __len__(self) -> int:
        # Always of a full epoch; without a length Lightning saves the state one batch too late.
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator, so nothing happens until the first batch: Lightning creates iterators early.
        self.batches.restore(self.position)
        self.specs.begin(stop=(self.position.batches // len(self) + 1) * len(self))
        for batch, report in super().__iter__():
            self.position = self.specs.snapshots.popleft()
            self._record(report)
            if self.position.batches % CHECK_EVERY == 0:
                self._check()
            yield batch

    @property
    def counts(self) -> dict[str, float]:
        """Counts over all processes, by name; see ``DataStats``.

        A collective operation: every process must access it.
        """
        return dict(self.position.counts + self._worker_counts())

    def _worker_counts(self) -> Counter[str]:
        return self.counts_before + sum_counters(self.worker_stats.counts)

    def _record(self, report: BatchReport) -> None:
        self.worker_stats.counts["pixels"] += round(report.pixels)
        self.worker_stats.counts["pixels/kept"] += round(report.kept)
        for bad in report.bad:
            self.worker_stats.note_bad(bad)

    def _check(self) -> None:
        """Check the counts of all processes on each of them, so that all raise the same error."""
        orders, workers = zip(
            *gather((self.position.counts, self.worker_stats.counts)), strict=True
        )
        check_counts(
            orders,
            unreadable=sum(map(_num_bad, (self.counts_before, *workers))),
            limit=self.max_bad_fraction,
        )

    # State

    def state_dict(self) -> dict[str, Any]:
        """The position in the order and the counts; call it on every process."""
        return {
            **self.batches.state_dict(self.position),
            "worker_counts": dict(self._worker_counts()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the position of ``state``."""
        self.position = self.batches.load_state_dict(state)
        self.worker_stats.counts.clear()
        self.counts_before = Counter(state["worker_counts"])


def check_counts(orders: Sequence[Counter[str]], *, unreadable: int, limit: float) -> None:
    """Raise if the processes disagree about the data, or if too much of it is bad.

    Args:
        orders: the order's counts on each process, by rank.
        unreadable: number of images that the workers of all processes could not read.
        limit: share of bad samples, or broken shards, above which an error is raised.

    Raises:
        ValueError: with the counts and the fix.
    """
    for rank, counts in enumerate(orders):
        if counts != orders[0]:
            raise ValueError(
                f"process {rank} lists other samples than process 0 ({format_counts(counts)}, "
                f"not {format_counts(orders[0])}), probably as only one of them can read a shard; "
                "fix access to the data, and resume with ckpt=auto"
            )
    stats = DataStats(limit=limit)
    stats.counts = orders[0]
    stats.check(more_bad=unreadable)


def _num_bad(counts: Counter[str]) -> int:
    return sum(number for name, number in counts.items() if name.startswith("bad/"))


class OnceLoader(DataLoader[Any]):
    """A loader of a fixed list of batch specs.

    Args:
        dataset: builds each batch and its ``BatchReport``.
        specs: one spec per batch.
        stats: counts unreadable samples; None creates new stats.
        options: options of torch's DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[tuple[Batch, BatchReport]],
        specs: list[BatchSpec],
        *,
        stats: DataStats | None = None,
        **options: Any,
    ) -> None:
        self.stats = stats or DataStats()
        super().__init__(dataset, batch_size=None, sampler=specs, **options)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch, _ in self.with_reports():
            yield batch

    def with_reports(self) -> Iterator[tuple[Batch, BatchReport]]:
        """Each batch with its worker's report."""
        for batch, report in super().__iter__():
            for bad in report.bad:
                self.stats.note_bad(bad)
            yield batch, report
