"""``shards.json``: the expected contents of a folder of shards, so that losses are detected."""

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict

from wuerstchen_pl.io.atomic import write_text

NAME = "shards.json"


class Entry(TypedDict):
    """One shard: file name, number of samples, size in bytes and sha256."""

    name: str
    samples: int
    bytes: int
    sha256: str


def entry_of(path: Path, samples: int) -> Entry:
    """The manifest entry of a shard that was just written."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "name": path.name,
        "samples": samples,
        "bytes": path.stat().st_size,
        "sha256": sha256,
    }


def write(folder: Path, shards: Iterable[Entry], **more: Any) -> None:
    """Write the manifest of a folder atomically, with additional top-level keys ``more``."""
    write_text(folder / NAME, json.dumps({**more, "shards": list(shards)}, indent=2) + "\n")


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None if it is missing or unreadable."""
    try:
        return _read(folder / NAME, (folder / NAME).stat().st_mtime_ns)
    except (OSError, ValueError, RecursionError):
        return None


@lru_cache(maxsize=16)
def _read(path: Path, mtime_ns: int) -> dict[str, Any] | None:
    content = json.loads(path.read_text("utf-8"))
    entries = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        return None
    return content


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(key), kind)
        for key, kind in (("name", str), ("samples", int), ("bytes", int), ("sha256", str))
    )


def expected_samples(shard: str) -> int | None:
    """A local shard's number of samples from the manifest beside it, or None."""
    path = Path(shard)
    entries = (read(path.parent) or {}).get("shards", ())
    return next((entry["samples"] for entry in entries if entry["name"] == path.name), None)
