"""Byte ranges of files, read from the last few that stay open, and files written whole."""

import os
from functools import lru_cache

_MAX_OPEN = 64  # well below the usual limit of 1,024 open files, per worker


class _Descriptor:
    """An open file, closed when nobody uses it any more: neither the cache nor another thread."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class OpenFiles:
    """Bytes of local files by path, offset and size."""

    def __init__(self) -> None:
        self._open = lru_cache(maxsize=_MAX_OPEN)(_Descriptor)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on.

        Raises:
            OSError: the file is not there, or ends before.
        """
        file = self._open(path)
        data = os.pread(file.number, size, offset)
        if len(data) != size:
            raise OSError(f"{path} became shorter after it was indexed")
        return data

    def __reduce__(self) -> tuple[type["OpenFiles"], tuple[()]]:
        # A file descriptor means nothing in another process.
        return OpenFiles, ()
