"""Reads byte ranges of files through a small cache of open file descriptors."""

import os
from functools import lru_cache

_MAX_OPEN = 64  # per worker; well below the usual limit of 1,024 open files


class _Descriptor:
    """An open file, closed once neither the cache nor a thread refers to it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class OpenFiles:
    """Reads local files by path, offset and size."""

    def __init__(self) -> None:
        self._open = lru_cache(maxsize=_MAX_OPEN)(_Descriptor)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """``size`` bytes starting at ``offset``.

        Raises:
            OSError: the file is missing or too short.
        """
        file = self._open(path)
        data = os.pread(file.number, size, offset)
        if len(data) != size:
            raise OSError(f"{path} was truncated after it was indexed")
        return data

    def __reduce__(self) -> tuple[type["OpenFiles"], tuple[()]]:
        # File descriptors are not valid in another process.
        return OpenFiles, ()
