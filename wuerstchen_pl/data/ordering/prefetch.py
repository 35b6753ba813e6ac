"""Opens the shards of a source, ahead of time in the background; caches those of a small set."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from wuerstchen_pl.data.sources.source import ShardIndex, Source
from wuerstchen_pl.plural import plural

_THREADS = 4  # shards that are opened or downloaded concurrently
_MAX_BROKEN = 8  # broken shards, before any sample was read, that stop the run
IMAGE_HASH = "image_hash"
"""The metadata key that ``hashes`` adds."""


class ShardPrefetcher:
    """Opens shards, in the background where possible.

    Args:
        source: source of the shards.
        keep: cache shards of at most this many samples in total, so that a small set is indexed
            once.
        hashes: add the hash of each image to its metadata, which reads all image bytes.
    """

    def __init__(self, source: Source, *, keep: int, hashes: bool = False) -> None:
        self.source = source
        self.keep = keep
        self.hashes = hashes
        self._cache: dict[str, ShardIndex] = {}
        self._cache_room = keep
        self._broken: list[str] | None = []  # None once a sample was read
        self._pending: dict[str, Future[ShardIndex]] = {}
        self._threads: ThreadPoolExecutor | None = None

    def open(self, shard: str) -> ShardIndex:
        """The index of a shard, opened now if it is not cached; waits if it is being opened.

        Raises:
            ValueError: the first shards are all broken.
        """
        if shard in self._cache:
            return self._cache[shard]
        future = self._pending.pop(shard, None)
        opened = self._open(shard) if future is None else future.result()
        # A broken shard may be readable the next time.
        if len(opened.samples) <= self._cache_room and not opened.broken:
            self._cache_room -= len(opened.samples)
            self._cache[shard] = opened
        self._check_broken(shard, opened)
        return opened

    def _check_broken(self, shard: str, opened: ShardIndex) -> None:
        if opened.samples:
            self._broken = None
        elif self._broken is not None and opened.broken:
            reason = opened.bad[0].reason if opened.bad else "empty"
            self._broken.append(f"{shard}: {reason}")
            if len(self._broken) == _MAX_BROKEN:
                raise ValueError(
                    f"none of the first {plural(_MAX_BROKEN, 'shard')} can be read "
                    f"({self._broken[0]}; {self._broken[1]}; ...); check the location of the data"
                )

    def expect(self, shards: Iterable[str]) -> None:
        """Start opening shards that will be needed soon."""
        self._threads = self._threads or ThreadPoolExecutor(_THREADS)
        for shard in shards:
            if shard not in self._cache and shard not in self._pending:
                self._pending[shard] = self._threads.submit(self._open, shard)

    def close(self) -> None:
        """Cancel the pending shards and stop the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self._threads, self._pending = None, {}

    def _open(self, shard: str) -> ShardIndex:
        opened = self.source.open(shard)
        for sample in opened.samples if self.hashes else ():
            try:
                image_hash = hashlib.blake2b(self.source.read(sample), digest_size=7).digest()
            except OSError:  # counted when it is decoded
                continue
            sample.metadata[IMAGE_HASH] = int.from_bytes(image_hash)
        return opened
