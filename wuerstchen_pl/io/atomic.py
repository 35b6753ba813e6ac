"""Files and folders that a kill or a power cut leaves whole or absent, and that damage betrays.

One is written temporary, forced to the disk, hashed, and then named. The hashes stand beside it, in the
form that ``sha256sum --check`` reads.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give the path to write a file to, which then is there whole or, after an error, not at all.

    Several processes may do so at a time: the last one wins.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(text, "utf-8")


def commit(temporary: Path, path: Path) -> None:
    """Give a file or folder that was written temporary its name.

    Raises:
        OSError: if the disk is full or fails; ``path`` is then as it was.
    """
    for file in _files(temporary):
        _sync(file)
    if temporary.is_dir():
        _sync(temporary)
    beside = _sidecar(path)
    partial = beside.with_name(f"{beside.name}.partial")
    names = (Path(path.name, file.relative_to(temporary)) for file in _files(temporary))
    lines = (f"{sha256(f)}  {name}\n" for f, name in zip(_files(temporary), names, strict=True))
    try:
        partial.write_text("".join(lines), "utf-8")
        _sync(partial)
        if path.is_dir() or (path.exists() and temporary.is_dir()):  # which cannot be replaced
            remove(path)
        os.replace(partial, beside)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # of a disk that has turned read-only
            partial.unlink(missing_ok=True)
    _sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file or folder, and its hashes."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    _sidecar(path).unlink(missing_ok=True)


def is_intact(path: Path) -> bool:
    """Whether a file or folder is what was published; true of one that has no hash beside it."""
    try:
        noted = _sidecar(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return True
    found = [f"{sha256(file)}  {Path(path.name, file.relative_to(path))}" for file in _files(path)]
    return bool(noted) and sorted(noted) == sorted(found)


def sha256(path: Path) -> str:
    """Hash of a file's bytes; of a folder, of its files' hashes and names."""
    if path.is_dir():
        each = "".join(f"{sha256(f)}  {f.relative_to(path)}\n" for f in _files(path))
        return hashlib.sha256(each.encode()).hexdigest()
    status = path.stat()
    return _file_sha256(path.absolute(), status.st_mtime_ns, status.st_size, status.st_ino)


@lru_cache(maxsize=1024)
def _file_sha256(path: Path, modified_ns: int, size: int, inode: int) -> str:
    """The hash of a file's bytes, computed once per version of the file: some have gigabytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """The files of a folder in the order of their names, or the file itself."""
    return iter(sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path])


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sync(path: Path) -> None:
    """Force what was written to the disk; of a folder, the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
