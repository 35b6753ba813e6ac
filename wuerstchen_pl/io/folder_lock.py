"""A lock on a folder, so that two programs do not write to it at the same time."""

import errno
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK = ".lock"
_HELD: set[int] = set()
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path, *, key: str) -> Iterator[None]:
    """Hold the lock of an existing folder within the block.

    It is an ``flock`` on ``.lock``, which names the owner's host, process and start. The kernel
    releases it when the owner ends, even if it is killed. On a file system without locks, a warning
    is logged instead.

    Raises:
        BlockingIOError: if another process holds it.
        OSError: if the file cannot be written.
    """
    path = folder / LOCK
    descriptor = _acquire(path, key)
    _HELD.add(descriptor)
    try:
        owner = {
            "host": platform.node(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps(owner).encode())
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        _HELD.discard(descriptor)
        os.close(descriptor)


def _acquire(path: Path, key: str) -> int:
    """Open and lock the file, which another process may remove in between."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 1000, 0)
            os.close(descriptor)
            raise BlockingIOError(
                f"{key}={path.parent} is in use by {_describe(owner)}; wait for it, stop it, or "
                "use another folder"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
            logger.warning("%s cannot be locked; let no other program write to it", path.parent)
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at ``path``."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _describe(owner: bytes) -> str:
    """The owner that a lock file names; it may be empty for a moment."""
    try:
        fields = json.loads(owner)
        return f"process {fields['process']} on {fields['host']} since {fields['since']}"
    except (ValueError, LookupError, TypeError):
        return "another process"


def _close_in_child() -> None:
    """Close inherited locks: worker processes must not keep them if the owner is killed."""
    for descriptor in _HELD:
        with suppress(OSError):
            os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_close_in_child)
