"""A folder of images with captions: beside them in `.txt` files, or in one table."""

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
_STRETCH = 5_000  # images that make a shard


@dataclass(frozen=True, slots=True)
class Row:
    """An image that is listed, or what is wrong with a line of a table.

    Attributes:
        path: in the folder; of a line that is wrong, where it is.
        caption: one, or a list of them; None looks for a file beside the image.
        metadata: what else the table says.
        wrong: why it cannot be used.
    """

    path: str
    caption: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    wrong: str = ""


class FolderSource:
    """A `Source` over a folder, and the folders in it.

    The captions are in `metadata.jsonl` or `metadata.csv`, with a column `file_name` and a column
    `text` (or caption, captions, prompt; a list is captions to draw from), as the hub's folders
    have them. Without a table, `a.txt` holds the caption of `a.jpg`, or of another image type.

    Args:
        root: the folder.
    """

    def __init__(self, *, root: str) -> None:
        self.root = Path(root).expanduser()
        self._rows: list[Row] | None = None

    def prepare(self) -> None:
        """Check that there is something.

        Raises:
            FileNotFoundError: there is no such folder, or no image in it.
            ValueError: its table lacks a column.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"data.root={str(self.root)!r} is not a folder: give the one your images are in."
            )
        if not self._listed():
            raise FileNotFoundError(
                f"data.root={str(self.root)!r} holds no image ({', '.join(IMAGE_SUFFIXES)}): give "
                "the folder your images are in."
            )

    def groups(self, split: Split) -> list[ShardGroup]:
        """Name the ranges of the folder."""
        if split == "val":
            return []
        return [ShardGroup(1.0, row_ranges(len(self._listed())))]

    def open(self, shard: str) -> ShardIndex:
        """List the samples of a stretch; reads the head of each image."""
        samples, bad = [], []
        for row in self._listed()[slice(*parse_range(shard))]:
            found = self._sample(shard, row)
            if isinstance(found, Sample):
                samples.append(found)
            else:
                bad.append(SampleError(found, str(self.root / row.path)))
        return ShardIndex(samples, bad)

    def read(self, sample: Sample) -> bytes:
        """Return the encoded image of a sample."""
        if not is_inside(sample.key):  # a name from an untrusted checkpoint
            raise PermissionError(f"{sample.key!r} is outside of {self.root}")
        return (self.root / sample.key).read_bytes()

    def _sample(self, shard: str, row: Row) -> Sample | str:
        path = self.root / row.path
        try:
            if row.wrong or not path.is_file():
                return row.wrong or "no image"
            caption = path.with_suffix(".txt").read_text("utf-8") if row.caption is None else ""
        except UnicodeDecodeError:
            return "caption is not UTF-8"
        except OSError:  # a name may be too long to be one
            return "no caption" if row.caption is None else "no image"
        captions = (caption.strip(),) if row.caption is None else parse_captions(row.caption)
        if not captions:
            return "caption is not UTF-8" if has_text(row.caption) else "no caption"
        size = upright_size(str(path))
        if size is None:
            return "unreadable image"
        place = 0, path.stat().st_size
        metadata = parse_scores(row.metadata)
        return Sample(
            row.path, captions, *size, shard, *place, group_key=row.path, metadata=metadata
        )

    def _listed(self) -> list[Row]:
        if self._rows is None:
            tables = [self.root / name for name in TABLES if (self.root / name).is_file()]
            self._rows = list(_of_table(tables[0])) if tables else list(_of_files(self.root))
        return self._rows

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers read by name, and need no list.
        return _folder, (str(self.root),)


def _folder(root: str) -> FolderSource:
    return FolderSource(root=root)


def row_ranges(count: int) -> list[str]:
    """Name the ranges of a list by their ends: if the list has grown, only the last is new."""
    starts = range(0, count, _STRETCH)
    return [f"{start:09d}-{min(start + _STRETCH, count):09d}" for start in starts]


def parse_range(stretch: str) -> tuple[int, int]:
    """Return the first place of a stretch, and the one behind its last."""
    start, _, end = stretch.partition("-")
    return int(start), int(end)


def is_inside(path: str) -> bool:
    """Whether a path leads nowhere but down."""
    return not os.path.isabs(path) and ".." not in Path(path).parts


def _of_files(root: Path) -> Iterator[Row]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield Row(os.path.relpath(os.path.join(folder, name), root))


def _of_table(table: Path) -> Iterator[Row]:
    """Read a table's rows; what is wrong with one is said in its place.

    Raises:
        ValueError: the first row that can be read lacks a column.
    """
    # the mark that some editors begin a file with is not a part of the first column's name
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = _of_csv(file) if table.suffix == ".csv" else _of_lines(file)
        checked = False
        for number, row in enumerate(rows, start=1):
            where = f"{table.name}, row {number}"
            if row is None:
                yield Row(where, wrong="unreadable row")
                continue
            path = next((row[name] for name in _PATH_COLUMNS if row.get(name)), None)
            column = next((name for name in _CAPTION_COLUMNS if name in row), None)
            if not checked and (path is None or column is None):
                missing = _PATH_COLUMNS if path is None else _CAPTION_COLUMNS
                raise ValueError(
                    f"row {number} of {table} has no {' or '.join(missing)}: name a column so."
                )
            checked = True
            if not isinstance(path, str):
                yield Row(where, wrong="no image")
            elif not is_inside(path):
                yield Row(f"{where}: {path}", wrong="image outside of the folder")
            else:
                yield Row(path, "" if column is None else row[column] or "", row)


def _of_csv(file: TextIO) -> Iterator[dict[str, Any] | None]:
    rows = csv.DictReader(file)
    while True:
        try:
            yield next(rows)
        except StopIteration:
            return
        except csv.Error:
            yield None


def _of_lines(lines: Iterable[str]) -> Iterator[dict[str, Any] | None]:
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield row if isinstance(row, dict) else None
