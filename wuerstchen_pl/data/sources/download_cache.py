"""Shards that are elsewhere: each is brought into a folder when it is opened, and kept for a while.

A shard from the web is then read like one on disk, at random and again after a restart. The folder
may be shared by all processes of a machine: a file appears in it whole, or not at all.
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

_TIMEOUT = 30.0  # seconds without a byte
_LEAST_RATE = 10_000  # bytes a second
_CHUNK = 1 << 20
_OWN = re.compile(r"[0-9a-f]{24}\.tar")  # names that we give
_LASTING = frozenset(
    {400, 401, 403, 404, 405, 410}
)  # statuses that will not change by asking again


class DownloadCache:
    """A folder of shards by address.

    Args:
        folder: where they are kept.
        keep_bytes: the oldest ones beyond this many bytes are removed, to be fetched again when
            they are wanted; one that alone is larger is not taken.
        attempts: how often a shard is asked for.
        wait: seconds before the second attempt; they double with each.
    """

    def __init__(
        self, *, folder: str, keep_bytes: int, attempts: int = 4, wait: float = 0.5
    ) -> None:
        self.folder, self.keep_bytes = Path(folder), keep_bytes
        self.attempts, self.wait = attempts, wait

    def path(self, address: str) -> str:
        """Return the local file of a shard, which is fetched if it is not there.

        Raises:
            OSError: it cannot be had.
        """
        target = self.folder / f"{hashlib.sha256(address.encode()).hexdigest()[:24]}.tar"
        if target.exists():
            return str(target)
        self.folder.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if not target.exists():  # else another process was faster
                    self._bring(address, target)
            finally:
                # closing would not do: a worker forked meanwhile holds the file open as well
                fcntl.flock(lock, fcntl.LOCK_UN)
        return str(target)

    def _bring(self, address: str, target: Path) -> None:
        partial = target.with_suffix(".partial")
        try:
            self._fetch(address, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        self._make_room(target)

    def _fetch(self, address: str, partial: Path) -> None:
        if address.startswith("pipe:"):
            _run(address.removeprefix("pipe:"), partial)
            return
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                _download(address, partial, self.keep_bytes)
            except (OSError, http.client.HTTPException, ValueError) as error:
                status = getattr(error, "code", None)
                lasting = status in _LASTING or getattr(error, "errno", None) == errno.EFBIG
                if lasting or attempt == self.attempts - 1:
                    tried = f" after {attempt + 1} attempts" if attempt else ""
                    reason = str(error) or type(error).__name__
                    raise OSError(f"it cannot be fetched{tried}: {reason}") from error
            else:
                return

    def _make_room(self, newest: Path) -> None:
        own = (path for path in self.folder.glob("*.tar") if _OWN.fullmatch(path.name))
        found = sorted(own, key=_age)
        total = sum(map(_size, found))
        for path in found:
            if total <= self.keep_bytes or path == newest:
                break
            total -= _size(path)
            path.unlink(missing_ok=True)


def _download(address: str, partial: Path, most: int) -> None:
    """Download a URL; resumes an earlier attempt if the server supports it."""
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        resumed = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        length = answer.headers.get("Content-Length")
        received, start = 0, time.monotonic()
        with partial.open("ab" if resumed else "wb") as file:
            while chunk := answer.read1(_CHUNK):
                received += file.write(chunk)
                if received > most:  # else one that never ends would fill the disk
                    raise OSError(errno.EFBIG, "it is larger than data.download_gb")
                elapsed = time.monotonic() - start
                if elapsed > _TIMEOUT and received < _LEAST_RATE * elapsed:
                    raise TimeoutError(f"{received} bytes in {elapsed:.0f} s are too slow")
    if length is not None and received < int(length):
        raise ConnectionError(f"the connection broke after {received} of {length} bytes")
    if length is None and not _ends_like_a_tar(partial):
        raise ConnectionError(f"the connection broke after {received} bytes")


def _run(command: str, partial: Path) -> None:
    with partial.open("wb") as file:
        done = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [""]
        raise OSError(f"its command failed with status {done.returncode}: {lines[-1]}")


def _ends_like_a_tar(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        return file.read() == bytes(1024)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _age(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
