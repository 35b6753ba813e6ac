"""Files that a kill or a power cut leaves whole or absent, and that damage later on betrays.

A file is written aside, forced to the disk, hashed, and then named. The hash stands beside it, in
the form that ``sha256sum --check`` reads.
"""

import hashlib
import os
from pathlib import Path


def publish(aside: Path, path: Path) -> None:
    """Give a file that was written aside its name.

    Raises:
        OSError: if the disk is full or fails; ``path`` is then as it was.
    """
    _sync(aside)
    beside = _beside(path)
    partial = beside.with_name(f"{beside.name}.partial")
    try:
        partial.write_text(f"{sha256(aside)}  {path.name}\n", "utf-8")
        _sync(partial)
        os.replace(partial, beside)
        os.replace(aside, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file and its hash."""
    path.unlink(missing_ok=True)
    _beside(path).unlink(missing_ok=True)


def is_intact(path: Path) -> bool:
    """Whether a file is what was published; true of one that has no hash beside it."""
    try:
        noted = _beside(path).read_text("utf-8").split()
    except (OSError, UnicodeDecodeError):
        return True
    return bool(noted) and noted[0] == sha256(path)


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sync(path: Path) -> None:
    """Force what was written to the disk; of a folder, the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
