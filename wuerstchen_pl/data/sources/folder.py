"""A folder of images, captioned by a file beside each image, or by tables."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wuerstchen_pl.data.sources.folder_listing import Row, list_folder
from wuerstchen_pl.data.sources.image_table import TableRow, is_inside
from wuerstchen_pl.data.sources.metadata import (
    file_captions,
    parse_captions,
    parse_metadata,
    parse_numbers,
)
from wuerstchen_pl.data.sources.sample_files import SampleFiles
from wuerstchen_pl.data.sources.source import (
    Sample,
    SampleError,
    ShardGroup,
    ShardIndex,
    Split,
    UnusableSampleError,
)
from wuerstchen_pl.io.image_files import IMAGE_SUFFIXES
from wuerstchen_pl.io.images import upright_size

_SHARD_ROWS = 5_000  # images per shard


class FolderSource:
    """A ``Source`` over a folder and its subfolders, also linked ones.

    ``a.txt`` contains the caption of ``a.jpg`` (or another image suffix; see ``sample_files``). In
    a folder with ``metadata.jsonl`` or ``metadata.csv``, and in its subfolders, captions come from
    this table, with the columns ``file_name`` and ``text`` (or caption, captions, prompt; of a
    list, training draws one), as in the Hub's image folders.

    Args:
        root: the folder.
        caption_lines: whether each line of a caption file is a caption, of which training draws
            one, instead of the whole file.

    Raises:
        ValueError: ``root`` is empty.
    """

    def __init__(self, *, root: str, caption_lines: bool = False) -> None:
        if not root:
            raise ValueError("root='' is empty; use the folder of your images")
        self.root = Path(root).expanduser()
        self.caption_lines = caption_lines
        self._rows: list[Row] | None = None

    def prepare(self) -> None:
        """Check that the folder contains images.

        Raises:
            FileNotFoundError: the folder does not exist or contains no image.
            ValueError: a table lacks a column, or a folder has two tables.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"data.root={str(self.root)!r} is not a folder; use the folder of your images"
            )
        rows = self._all_rows()
        if all(isinstance(row, SampleError) for row in rows):
            counts = Counter(row.reason for row in rows if isinstance(row, SampleError))
            summary = "".join(f"; {number} x {reason}" for reason, number in sorted(counts.items()))
            raise FileNotFoundError(
                f"data.root={str(self.root)!r} contains no images ({', '.join(IMAGE_SUFFIXES)}"
                f"{summary}); use the folder of your images"
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
            if isinstance(row, SampleError):
                bad.append(row)
                continue
            try:
                samples.append(self._sample(shard, row))
            except UnusableSampleError as error:
                bad.append(SampleError(str(error), str(self.root / row.image)))
        return ShardIndex(samples, bad)

    def read(self, sample: Sample) -> bytes:
        """The encoded image of a sample."""
        if not is_inside(sample.key):  # the key may come from an untrusted checkpoint
            raise PermissionError(f"{sample.key!r} is outside {self.root}")
        return (self.root / sample.key).read_bytes()

    def _sample(self, shard: str, row: SampleFiles | TableRow) -> Sample:
        """The sample of a row.

        Raises:
            UnusableSampleError: it cannot be used.
        """
        path = self.root / row.image
        num_bytes = _num_bytes(path)
        if num_bytes is None:
            raise UnusableSampleError("no image")
        captions, metadata = self._captions(row)
        size = upright_size(str(path))
        if size is None:
            raise UnusableSampleError("unreadable image")
        sample = Sample(
            row.image,
            captions,
            *size,
            shard,
            size=num_bytes,
            group_key=row.image,
            metadata=parse_numbers(metadata),
        )
        mask, control = (_num_bytes(self.root / s.key) for s in (sample.mask, sample.control))
        return replace(sample, mask_size=mask or 0, control_size=control or 0)

    def _captions(self, row: SampleFiles | TableRow) -> tuple[tuple[str, ...], Mapping[str, Any]]:
        """The captions and the metadata of a row."""
        if isinstance(row, TableRow):
            return parse_captions(row.captions), row.metadata
        metadata = parse_metadata(self._content(row.metadata))
        caption = self._content(row.caption)
        return file_captions(caption, metadata, by_line=self.caption_lines), metadata

    def _content(self, name: str | None) -> bytes | None:
        """The content of a file, if it is one that can be read."""
        try:
            path = self.root / (name or "")
            return path.read_bytes() if path.is_file() else None
        except OSError:
            return None

    def _all_rows(self) -> list[Row]:
        if self._rows is None:
            self._rows = list(list_folder(self.root))
        return self._rows

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers read by path and do not need the rows.
        return _folder, (str(self.root), self.caption_lines)


def _folder(root: str, caption_lines: bool) -> FolderSource:
    return FolderSource(root=root, caption_lines=caption_lines)


def _num_bytes(path: Path) -> int | None:
    """The size of a file; None if there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:  # a name that is too long
        return None


def row_ranges(count: int) -> list[str]:
    """Names of ranges of ``count`` rows, as START-END; growth renames only the last range."""
    starts = range(0, count, _SHARD_ROWS)
    return [f"{start:09d}-{min(start + _SHARD_ROWS, count):09d}" for start in starts]


def parse_range(row_range: str) -> tuple[int, int]:
    """(start, end) of a row range; the end is exclusive."""
    start, _, end = row_range.partition("-")
    return int(start), int(end)
