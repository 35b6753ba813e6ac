"""Atomic writes of files and folders, and detection of damage by sha256.

``atomic_write`` is for any file. ``commit`` is for checkpoints: it also syncs the data to disk and
writes a sidecar with the sha256 of each file, in the format of ``sha256sum --check``.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TypedDict


class Source(TypedDict):
    """Path and hash of a file that weights were read from."""

    path: str
    sha256: str


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to ``path`` after the block.

    After an error no temporary file remains and ``path`` is unchanged. Several processes may write
    the same path concurrently: the last one wins.

    Raises:
        OSError: if the folder or the file cannot be written; the message names ``path``.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    created = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if created and not path.exists():
            with suppress(OSError):
                path.parent.rmdir()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, which is renamed to ``path`` after the block.

    Raises:
        OSError: if it cannot be written; the message names ``path``.
    """
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; see ``atomic_write``."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, "utf-8")


def commit(temporary: Path, path: Path) -> None:
    """Rename a file or folder to ``path``, synced to disk, and write its sidecar.

    If ``path`` is an existing file, the sidecar lists both the old and the new hash while the file
    is replaced, so that ``path`` matches its sidecar whenever the process is killed. A folder
    cannot be replaced atomically: the old one is removed first.

    Raises:
        OSError: if the disk is full or fails; ``path`` is then either unchanged or replaced.
    """
    for file in _files(temporary):
        _sync(file)
    if temporary.is_dir():
        _sync(temporary)
    lines = _hash_lines(temporary, path.name)
    if path.is_dir() or (path.exists() and temporary.is_dir()):
        remove(path)
    previous = (_sidecar_lines(path) or _hash_lines(path, path.name)) if path.exists() else []
    _write_sidecar(path, [*previous, *lines])
    os.replace(temporary, path)
    _sync(path.parent)
    if previous:
        _write_sidecar(path, lines)


def remove(path: Path) -> None:
    """Remove a file or folder together with its sidecar."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    _sidecar(path).unlink(missing_ok=True)


def is_intact(path: Path) -> bool:
    """Whether a file or folder matches its sidecar; True if it has none."""
    if (recorded := _sidecar_lines(path)) is None:
        return True
    lines = _hash_lines(path, path.name)
    names = {line.partition("  ")[2] for line in recorded}
    return set(lines) <= set(recorded) and {line.partition("  ")[2] for line in lines} == names


def _hash_lines(path: Path, name: str) -> list[str]:
    """``sha256  name/file`` lines for each file of a folder, or for a single file."""
    return [f"{sha256(file)}  {Path(name, file.relative_to(path))}" for file in _files(path)]


def _sidecar_lines(path: Path) -> list[str] | None:
    try:
        return _sidecar(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None


def _write_sidecar(path: Path, lines: list[str]) -> None:
    sidecar = _sidecar(path)
    temporary = sidecar.with_name(f"{sidecar.name}.partial")
    try:
        temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        _sync(temporary)
        os.replace(temporary, sidecar)
    finally:
        with suppress(OSError):  # the disk may have become read-only
            temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The sha256 of a file; for a folder, of the hashes and names of its files."""
    if path.is_dir():
        listing = "".join(f"{sha256(f)}  {f.relative_to(path)}\n" for f in _files(path))
        return hashlib.sha256(listing.encode()).hexdigest()
    status = path.stat()
    return _file_sha256(path.absolute(), status.st_mtime_ns, status.st_size, status.st_ino)


@lru_cache(maxsize=1024)
def _file_sha256(path: Path, modified_ns: int, size: int, inode: int) -> str:
    """The sha256 of a file, cached by modification time because checkpoints can be large."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """The files of a folder sorted by path, or the file itself."""
    return iter(sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path])


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sync(path: Path) -> None:
    """Sync a file's data, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
