"""A folder of images, captioned by a ``.txt`` file per image or by one table."""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from wuerstchen_pl.data.sources.metadata import has_text, parse_captions, parse_scores
from wuerstchen_pl.data.sources.source import Sample, SampleError, ShardGroup, ShardIndex, Split
from wuerstchen_pl.io.images import IMAGE_SUFFIXES, upright_size

TABLES = ("metadata.jsonl", "metadata.csv")
_PATH_COLUMNS = ("file_name", "file", "image", "path")
_CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
_SHARD_ROWS = 5_000  # images per shard


@dataclass(frozen=True, slots=True)
class Row:
    """A listed image, or an unusable row of the table.

    Attributes:
        path: relative to the folder; for an unusable row, its location in the table.
        caption: a caption or a list of captions; None reads the ``.txt`` file beside the image.
        metadata: all columns of the table row.
        error: why the row cannot be used; empty for a usable one.
    """

    path: str
    caption: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class FolderSource:
    """A ``Source`` over a folder and its subfolders.

    Captions come from ``metadata.jsonl`` or ``metadata.csv``, with the columns ``file_name`` and
    ``text`` (or caption, captions, prompt; of a list, training draws one), as in the Hub's image
    folders. Without a table, ``a.txt`` contains the caption of ``a.jpg`` (or another image suffix).

    Args:
        root: the folder.
    """

    def __init__(self, *, root: str) -> None:
        self.root = Path(root).expanduser()
        self._rows: list[Row] | None = None

    def prepare(self) -> None:
        """Check that the folder contains images.

        Raises:
            FileNotFoundError: the folder does not exist or contains no image.
            ValueError: its table lacks a column.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"data.root={str(self.root)!r} is not a folder; use the folder of your images"
            )
        if not self._all_rows():
            raise FileNotFoundError(
                f"data.root={str(self.root)!r} contains no images ({', '.join(IMAGE_SUFFIXES)}); "
                "use the folder of your images"
            )

    def groups(self, split: Split) -> list[ShardGroup]:
        """The shards, which are row ranges; there is no validation split."""
        if split == "val":
            return []
        return [ShardGroup(1.0, row_ranges(len(self._all_rows())))]

    def open(self, shard: str) -> ShardIndex:
        """Index the samples of a row range; reads the header of each image."""
        samples, bad = [], []
        for row in self._all_rows()[slice(*parse_range(shard))]:
            result = self._sample(shard, row)
            if isinstance(result, Sample):
                samples.append(result)
            else:
                bad.append(SampleError(result, str(self.root / row.path)))
        return ShardIndex(samples, bad)

    def read(self, sample: Sample) -> bytes:
        """The encoded image of a sample."""
        if not is_inside(sample.key):  # the key may come from an untrusted checkpoint
            raise PermissionError(f"{sample.key!r} is outside {self.root}")
        return (self.root / sample.key).read_bytes()

    def _sample(self, shard: str, row: Row) -> Sample | str:
        """The sample of a row, or the reason why it cannot be used."""
        path = self.root / row.path
        try:
            if row.error or not path.is_file():
                return row.error or "no image"
            caption = path.with_suffix(".txt").read_text("utf-8") if row.caption is None else ""
        except UnicodeDecodeError:
            return "caption is not UTF-8"
        except OSError:  # includes names that are too long
            return "no caption" if row.caption is None else "no image"
        captions = (caption.strip(),) if row.caption is None else parse_captions(row.caption)
        if not captions:
            return "caption is not UTF-8" if has_text(row.caption) else "no caption"
        size = upright_size(str(path))
        if size is None:
            return "unreadable image"
        byte_range = 0, path.stat().st_size
        metadata = parse_scores(row.metadata)
        return Sample(
            row.path, captions, *size, shard, *byte_range, group_key=row.path, metadata=metadata
        )

    def _all_rows(self) -> list[Row]:
        if self._rows is None:
            tables = [self.root / name for name in TABLES if (self.root / name).is_file()]
            self._rows = list(_table_rows(tables[0])) if tables else list(_image_rows(self.root))
        return self._rows

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers read by path and do not need the rows.
        return _folder, (str(self.root),)


def _folder(root: str) -> FolderSource:
    return FolderSource(root=root)


def row_ranges(count: int) -> list[str]:
    """Names of ranges of ``count`` rows, as START-END; growth renames only the last range."""
    starts = range(0, count, _SHARD_ROWS)
    return [f"{start:09d}-{min(start + _SHARD_ROWS, count):09d}" for start in starts]


def parse_range(row_range: str) -> tuple[int, int]:
    """(start, end) of a row range; the end is exclusive."""
    start, _, end = row_range.partition("-")
    return int(start), int(end)


def is_inside(path: str) -> bool:
    """Whether a relative path stays inside its root folder."""
    return not os.path.isabs(path) and ".." not in Path(path).parts


def _image_rows(root: Path) -> Iterator[Row]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield Row(os.path.relpath(os.path.join(folder, name), root))


def _table_rows(table: Path) -> Iterator[Row]:
    """The rows of a table; an unusable one has its ``error`` set.

    Raises:
        ValueError: the first readable row lacks a column.
    """
    # utf-8-sig: a byte order mark is not part of the first column's name.
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = _csv_rows(file) if table.suffix == ".csv" else _jsonl_rows(file)
        checked = False
        for number, row in enumerate(rows, start=1):
            where = f"{table.name}, row {number}"
            if row is None:
                yield Row(where, error="unreadable row")
                continue
            path = next((row[name] for name in _PATH_COLUMNS if row.get(name)), None)
            column = next((name for name in _CAPTION_COLUMNS if name in row), None)
            if not checked and (path is None or column is None):
                missing = _PATH_COLUMNS if path is None else _CAPTION_COLUMNS
                raise ValueError(
                    f"row {number} of {table} has no {' or '.join(missing)}; add such a column"
                )
            checked = True
            if not isinstance(path, str):
                yield Row(where, error="no image")
            elif not is_inside(path):
                yield Row(f"{where}: {path}", error="image outside of the folder")
            else:
                yield Row(path, "" if column is None else row[column] or "", row)


def _csv_rows(file: TextIO) -> Iterator[dict[str, Any] | None]:
    rows = csv.DictReader(file)
    while True:
        try:
            yield next(rows)
        except StopIteration:
            return
        except csv.Error:
            yield None


def _jsonl_rows(lines: Iterable[str]) -> Iterator[dict[str, Any] | None]:
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield row if isinstance(row, dict) else None
