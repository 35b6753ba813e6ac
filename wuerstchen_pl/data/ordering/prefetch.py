"""Opens the shards of a source: ahead of time in the background, and the first ones just once."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from wuerstchen_pl.data.sources.source import ShardIndex, Source

_THREADS = 4  # shards that are opened, or downloaded, at a time
_MAX_BROKEN = 8  # broken shards, with nothing read before, after which a run stops
IMAGE_HASH = "image_hash"
"""The fact that `hashes` adds."""


class ShardPrefetcher:
    """Lists what shards hold.

    Args:
        source: whose shards.
        keep: shards that hold at most this many samples in all stay open, so that a small set is
            read once.
        hashes: add each image's hash to its metadata, which reads all of its bytes.
    """

    def __init__(self, source: Source, *, keep: int, hashes: bool = False) -> None:
        self.source = source
        self.keep = keep
        self.hashes = hashes
        self._kept: dict[str, ShardIndex] = {}
        self._room = keep
        self._broken: list[str] | None = []  # None once there was a sample
        self._coming: dict[str, Future[ShardIndex]] = {}
        self._threads: ThreadPoolExecutor | None = None

    def open(self, shard: str) -> ShardIndex:
        """List what a shard holds; waits if it is being opened.

        Raises:
            ValueError: the first shards that were asked for are all broken.
        """
        if shard in self._kept:
            return self._kept[shard]
        coming = self._coming.pop(shard, None)
        opened = self._open(shard) if coming is None else coming.result()
        # a broken one may be whole when it is asked for again
        if len(opened.samples) <= self._room and not opened.broken:
            self._room -= len(opened.samples)
            self._kept[shard] = opened
        self._check_hope(shard, opened)
        return opened

    def _check_hope(self, shard: str, opened: ShardIndex) -> None:
        if opened.samples:
            self._broken = None
        elif self._broken is not None and opened.broken:
            reason = opened.bad[0].reason if opened.bad else "empty"
            self._broken.append(f"{shard}: {reason}")
            if len(self._broken) == _MAX_BROKEN:
                raise ValueError(
                    f"none of the first {_MAX_BROKEN} shards can be read ({self._broken[0]}; "
                    f"{self._broken[1]}; ...): look at where data says they are."
                )

    def expect(self, shards: Iterable[str]) -> None:
        """Begin to open shards that will be asked for."""
        self._threads = self._threads or ThreadPoolExecutor(_THREADS)
        for shard in shards:
            if shard not in self._kept and shard not in self._coming:
                self._coming[shard] = self._threads.submit(self._open, shard)

    def close(self) -> None:
        """Give up what was only expected."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self._threads, self._coming = None, {}

    def _open(self, shard: str) -> ShardIndex:
        opened = self.source.open(shard)
        for sample in opened.samples if self.hashes else ():
            try:
                image_hash = hashlib.blake2b(self.source.read(sample), digest_size=7).digest()
            except OSError:  # counted when its epoch comes
                continue
            sample.metadata[IMAGE_HASH] = int.from_bytes(image_hash)
        return opened
