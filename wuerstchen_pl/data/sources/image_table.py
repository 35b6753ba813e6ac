"""Reads tables of images and captions: ``metadata.jsonl`` and ``metadata.csv``."""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from wuerstchen_pl.data.sources.source import SampleError
from wuerstchen_pl.io.text_files import text_encoding

TABLES = ("metadata.jsonl", "metadata.csv")
_IMAGE_COLUMNS = ("file_name", "file", "image", "path")
_CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")


class TableRow(NamedTuple):
    """A row of a table: an image, relative to the table's folder, its captions, and all columns.

    ``captions`` is not parsed yet; it should be a string or a list of strings.
    """

    image: str
    captions: Any
    metadata: dict[str, Any]


def read_table(table: Path) -> Iterator[TableRow | SampleError]:
    """The rows of a table; an unusable one is an error.

    Raises:
        ValueError: the first readable row lacks a column.
    """
    with table.open("rb") as binary:
        encoding = text_encoding(binary.read(2))
    with table.open(encoding=encoding, errors="surrogateescape", newline="") as file:
        rows = _csv_rows(file) if table.suffix == ".csv" else _jsonl_rows(file)
        checked = False
        for number, row in enumerate(rows, start=1):
            where = f"{table}, row {number}"
            if row is None:
                yield SampleError("unreadable row", where)
                continue
            image = next((row[name] for name in _IMAGE_COLUMNS if row.get(name)), None)
            column = next((name for name in _CAPTION_COLUMNS if name in row), None)
            if not checked and (image is None or column is None):
                missing = _IMAGE_COLUMNS if image is None else _CAPTION_COLUMNS
                raise ValueError(
                    f"row {number} of {table} has no {' or '.join(missing)}; add such a column"
                )
            checked = True
            if not isinstance(image, str):
                yield SampleError("no image", where)
            elif not is_inside(image):
                yield SampleError("image outside of the folder", f"{where}: {image}")
            else:
                yield TableRow(image, row.get(column or ""), row)


def is_inside(path: str) -> bool:
    """Whether a relative path stays inside its root folder."""
    return not os.path.isabs(path) and ".." not in Path(path).parts


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
