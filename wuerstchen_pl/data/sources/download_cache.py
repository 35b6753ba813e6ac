"""Remote shards: each is downloaded into a cache folder when it is opened; old ones are evicted.

A downloaded shard supports random access, and survives restarts. The folder may be shared by all
processes of a machine: files appear in it atomically.
"""

import errno
import fcntl
import hashlib
import http.client
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from wuerstchen_pl.data.sources.tar_index import index_path

_TIMEOUT = 30.0  # seconds without receiving a byte
_MIN_RATE = 10_000  # bytes per second
_CHUNK = 1 << 20
_CACHED_NAME = re.compile(r"[0-9a-f]{24}\.tar")  # file names that this cache creates
_PERMANENT_STATUSES = frozenset({400, 401, 403, 404, 405, 410})  # a retry would not help


class DownloadCache:
    """A folder of downloaded shards, keyed by URL.

    Args:
        folder: the cache folder.
        keep_bytes: size limit; the oldest shards beyond it are removed, and downloaded again when
            needed. A single shard larger than this is an error.
        attempts: maximum number of download attempts per shard.
        wait: seconds before the second attempt; doubles with each further one.
    """

    def __init__(
        self, *, folder: str, keep_bytes: int, attempts: int = 4, wait: float = 0.5
    ) -> None:
        self.folder, self.keep_bytes = Path(folder), keep_bytes
        self.attempts, self.wait = attempts, wait

    def path(self, url: str) -> str:
        """The local path of a shard, which is downloaded if it is not cached.

        Raises:
            OSError: the shard cannot be fetched.
        """
        target = self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:24]}.tar"
        if target.exists():
            return str(target)
        self.folder.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if not target.exists():  # another process may have been faster
                    self._fetch_to(url, target)
            finally:
                # Closing is not enough: a worker forked meanwhile also has the file open.
                fcntl.flock(lock, fcntl.LOCK_UN)
        return str(target)

    def _fetch_to(self, url: str, target: Path) -> None:
        partial = target.with_suffix(".partial")
        try:
            self._fetch(url, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        self._evict(keep=target)

    def _fetch(self, url: str, partial: Path) -> None:
        if url.startswith("pipe:"):
            _run_command(url.removeprefix("pipe:"), partial)
            return
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                _download(url, partial, self.keep_bytes)
            except (OSError, http.client.HTTPException, ValueError) as error:
                status = getattr(error, "code", None)
                too_large = getattr(error, "errno", None) == errno.EFBIG
                permanent = status in _PERMANENT_STATUSES or too_large
                if permanent or attempt == self.attempts - 1:
                    tries = f" after {attempt + 1} attempts" if attempt else ""
                    reason = str(error) or type(error).__name__
                    raise OSError(f"cannot be fetched{tries}: {reason}") from error
            else:
                return

    def _evict(self, keep: Path) -> None:
        cached = (p for p in self.folder.glob("*.tar") if _CACHED_NAME.fullmatch(p.name))
        oldest_first = sorted(cached, key=_mtime)
        total = sum(map(_size, oldest_first))
        for path in oldest_first:
            if total <= self.keep_bytes or path == keep:
                break
            total -= _size(path)
            path.unlink(missing_ok=True)
            index_path(path).unlink(missing_ok=True)


def _download(url: str, partial: Path, max_bytes: int) -> None:
    """Download a URL; resumes an earlier attempt if the server supports it."""
    offset = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        length = response.headers.get("Content-Length")
        received, start = 0, time.monotonic()
        with partial.open("ab" if resumed else "wb") as file:
            while chunk := response.read1(_CHUNK):
                received += file.write(chunk)
                if received > max_bytes:  # an endless response would fill the disk
                    raise OSError(errno.EFBIG, "larger than data.download_gb")
                elapsed = time.monotonic() - start
                if elapsed > _TIMEOUT and received < _MIN_RATE * elapsed:
                    raise TimeoutError(f"too slow: {received} bytes in {elapsed:.0f} s")
    if length is not None and received < int(length):
        raise ConnectionError(f"connection closed after {received} of {length} bytes")
    if length is None and not _has_tar_end(partial):
        raise ConnectionError(f"connection closed after {received} bytes")


def _run_command(command: str, partial: Path) -> None:
    with partial.open("wb") as file:
        result = subprocess.run(
            command, shell=True, stdout=file, stderr=subprocess.PIPE, check=False
        )
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines() or [""]
        raise OSError(f"command failed with status {result.returncode}: {lines[-1]}")


def _has_tar_end(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        return file.read() == bytes(1024)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _mtime(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
