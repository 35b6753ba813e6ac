"""A folder of pictures with captions: beside them in `.txt` files, or in one table."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wuerstchen_pl.data.source import FACTS, Bad, Group, Opened, Sample, Split
from wuerstchen_pl.data.tar import PICTURE_TYPES, captions_of, upright_size

TABLES = ("metadata.jsonl", "metadata.csv")
_PATH_COLUMNS = ("file_name", "file", "image", "path")
_CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
_STRETCH = 5_000  # pictures that make a shard

Row = tuple[str, tuple[str, ...] | None, dict[str, Any]]  # path in the folder, captions, facts


class Folder:
    """A `Source` over a folder, and the folders in it.

    The captions stand in `metadata.jsonl` or `metadata.csv`, with a column `file_name` and a column
    `text` (or caption, captions, prompt; a list is captions to draw from), as the hub's folders
    have them. Without a table, `a.txt` holds the caption of `a.jpg`, or of another picture type.

    Args:
        root: the folder.
    """

    def __init__(self, *, root: str) -> None:
        self.root = Path(root).expanduser()
        self._rows: list[Row] | None = None

    def prepare(self) -> None:
        """Check that there is something.

        Raises:
            FileNotFoundError: there is no such folder, or no picture in it.
            ValueError: its table lacks a column.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"data.root={str(self.root)!r} is no folder: give the one your pictures are in."
            )
        if not self._listed():
            raise FileNotFoundError(
                f"data.root={str(self.root)!r} holds no picture ({', '.join(PICTURE_TYPES)}): give "
                "the folder your pictures are in."
            )

    def groups(self, split: Split) -> list[Group]:
        """Name the stretches of the folder."""
        if split == "val":
            return []
        return [Group(1.0, [f"{i:06d}" for i in range(0, len(self._listed()), _STRETCH)])]

    def open(self, shard: str) -> Opened:
        """List the samples of a stretch; reads the head of each picture."""
        samples, bad = [], []
        for path, captions, facts in self._listed()[int(shard) : int(shard) + _STRETCH]:
            found = self._sample(shard, path, captions, facts)
            if isinstance(found, Sample):
                samples.append(found)
            else:
                bad.append(Bad(found, str(self.root / path)))
        return Opened(samples, bad)

    def read(self, sample: Sample) -> bytes:
        """Return the encoded picture of a sample."""
        return (self.root / sample.key).read_bytes()

    def _sample(
        self, shard: str, path: str, captions: tuple[str, ...] | None, facts: dict[str, Any]
    ) -> Sample | str:
        if not (self.root / path).is_file():
            return "no picture"
        if captions is None:
            try:
                text = (self.root / path).with_suffix(".txt").read_text("utf-8")
            except FileNotFoundError:
                return "no caption"
            except UnicodeDecodeError:
                return "caption is not UTF-8"
            captions = (text.strip(),)
        if not captions:
            return "no caption"
        size = upright_size(str(self.root / path))
        if size is None:
            return "unreadable picture"
        known = {}
        for name in FACTS:
            try:
                known[name] = float(facts[name])
            except (KeyError, TypeError, ValueError):
                continue
        return Sample(path, captions, *size, shard, family=path, facts=known)

    def _listed(self) -> list[Row]:
        if self._rows is None:
            tables = [self.root / name for name in TABLES if (self.root / name).is_file()]
            self._rows = list(_of_table(tables[0])) if tables else list(_of_files(self.root))
        return self._rows

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers read by name, and need no list.
        return _folder, (str(self.root),)


def _folder(root: str) -> Folder:
    return Folder(root=root)


def _of_files(root: Path) -> Iterator[Row]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            if name.rpartition(".")[2].lower() in PICTURE_TYPES and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root), None, {}


def _of_table(table: Path) -> Iterator[Row]:
    """Read a table's rows.

    Raises:
        ValueError: a line cannot be read, or a column is missing.
    """
    with table.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.DictReader(file) if table.suffix == ".csv" else _of_lines(table, file)
        for number, row in enumerate(rows, start=1):
            path = next((row[name] for name in _PATH_COLUMNS if row.get(name)), None)
            column = next((name for name in _CAPTION_COLUMNS if name in row), None)
            if path is None or column is None:
                missing = _PATH_COLUMNS if path is None else _CAPTION_COLUMNS
                raise ValueError(
                    f"row {number} of {table} has no {' or '.join(missing)}: name a column so."
                )
            if os.path.isabs(path) or ".." in Path(path).parts:
                raise ValueError(
                    f"row {number} of {table} names {path!r}, which is outside of its folder: "
                    "write paths relative to the table."
                )
            yield path, captions_of(row[column]), row


def _of_lines(table: Path, lines: Any) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {table} is no JSON object: mend or remove it.")
        yield row
