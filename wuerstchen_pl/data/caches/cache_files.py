"""The files of a cache.

A cache is a folder of safetensors files and a manifest, ``cache.json``. A file contains, for each
bucket size, ``<name>/<height>x<width>`` with one row per crop of each sample; ``text`` with the
embeddings of their captions; and the list of samples in its metadata. ``empty.safetensors`` has
the embeddings of the empty caption, so that captions can still be dropped.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from wuerstchen_pl.data.ordering.buckets import Size
from wuerstchen_pl.data.sources.source import Sample, Split
from wuerstchen_pl.io.atomic import atomic_write, write_text

MANIFEST = "cache.json"
EMPTY = "empty.safetensors"
KEYS: Mapping[str, Any] = {
    "preprocessing": int, "tensors": list[str], "crops": int, "sizes": list[list[int]],
    "text": bool, "made_with": dict[str, str], "shards": list[dict[str, Any]],
}  # fmt: skip
"""Types of the keys of the manifest."""
SHARD_KEYS: Mapping[str, Any] = {"name": str, "split": Split, "bytes": int}
"""Types of the keys of each of its shards."""
PREPROCESSING = 2  # increment when decoding, cropping or entries change: older caches are stale


class ShardWriter:
    """Collects encoded samples and writes them atomically as one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, list[Tensor]] = {}
        self._text: list[Tensor] = []
        self._samples: list[list[Any]] = []
        self._num_rows: dict[str, int] = {}

    def add(
        self, sample: Sample, size: Size, crops: dict[str, Tensor], text: Tensor | None
    ) -> None:
        """Add a sample.

        Args:
            sample: the sample.
            size: (height, width) of its bucket.
            crops: tensors (crops, ...) by name, one row per crop.
            text: (captions, L, D) embeddings of its captions.
        """
        bucket = f"{size[0]}x{size[1]}"
        row = self._num_rows.get(bucket, 0)
        for name, tensor in crops.items():
            self._rows.setdefault(f"{name}/{bucket}", []).append(tensor)
            self._num_rows[bucket] = row + len(tensor)
        first_text = sum(map(len, self._text))
        self._text += [] if text is None else [text]
        captions = list(sample.captions)
        rows = row, first_text
        self._samples.append([sample.key, captions, size[1], size[0], *rows, sample.weight])

    def write(self) -> None:
        """Write the file atomically."""
        tensors = {name: torch.cat(rows).contiguous() for name, rows in self._rows.items()}
        if self._text:
            tensors["text"] = torch.cat(self._text).contiguous()
        with atomic_write(self.path) as partial:
            save_file(tensors, partial, metadata={"samples": json.dumps(self._samples)})
            partial.chmod(0o644)  # safetensors creates files readable by their owner only


def write_manifest(root: Path, names: Sequence[tuple[str, Split]], **metadata: Any) -> None:
    """Write ``cache.json``, which marks the cache as complete."""
    shards = [
        {"name": name, "split": split, "bytes": (root / name).stat().st_size}
        for name, split in names
    ]
    write_text(root / MANIFEST, json.dumps({**metadata, "shards": shards}, indent=2) + "\n")


def read_entries(path: Path) -> list[Any]:
    """The samples that a file lists in its metadata."""
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})["samples"])
