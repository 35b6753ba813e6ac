"""Lists the images of a folder with its subfolders, and what in it is not used."""

import os
from collections.abc import Iterator
from pathlib import Path

from wuerstchen_pl.data.sources.image_table import TABLES, TableRow, read_table
from wuerstchen_pl.data.sources.sample_files import SampleFiles, group_files
from wuerstchen_pl.data.sources.source import SampleError
from wuerstchen_pl.io.image_files import (
    CONTROL_SUFFIX,
    IMAGE_SUFFIXES,
    MASK_SUFFIX,
    is_hidden,
    split_suffix,
)

Row = SampleFiles | TableRow | SampleError
"""The files of a sample, a row of a table, or something that is not used; paths begin in the root,
except those of a ``SampleError``."""


def list_folder(root: Path) -> Iterator[Row]:
    """The rows of all tables, then the other images; each in the order of their names.

    Raises:
        ValueError: a table lacks a column, or a folder has two tables.
    """
    unreadable: list[SampleError] = []
    contents = dict(_walk(root, unreadable))
    covered: set[Path] = set()  # folders with a table there or above
    listed: set[str] = set()
    for folder, names in contents.items():
        if (table := _table(root / folder, names)) is not None:
            covered.add(folder)
            for row in read_table(table):
                if isinstance(row, TableRow):
                    row = row._replace(image=os.path.normpath(folder / row.image))
                    listed.add(row.image)
                yield row
        elif folder.parent in covered and folder != folder.parent:
            covered.add(folder)
    samples, unused = group_files(
        str(folder / name)
        for folder, names in contents.items()
        if folder not in covered
        for name in names
    )
    for folder, names in contents.items():  # not of ``covered``, which has no order
        if folder in covered:
            unused += _unlisted([str(folder / name) for name in names], listed)
    yield from samples
    yield from (SampleError(error.reason, str(root / error.where)) for error in unused)
    yield from unreadable


def _walk(root: Path, unreadable: list[SampleError]) -> Iterator[tuple[Path, list[str]]]:
    """Each folder, relative to the root, and the sorted names of its files.

    Linked folders are followed, but no folder is visited twice.
    """

    def note(error: OSError) -> None:
        unreadable.append(SampleError("unreadable folder", str(error.filename)))

    visited: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=note, followlinks=True):
        folders.sort()
        if (target := os.path.realpath(folder)) in visited:
            folders.clear()
            continue
        visited.add(target)
        yield Path(os.path.relpath(folder, root)), sorted(names)


def _table(folder: Path, names: list[str]) -> Path | None:
    """The table of a folder, if it has one.

    Raises:
        ValueError: it has two.
    """
    tables = [folder / name for name in TABLES if name in names and (folder / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"{folder} contains {' and '.join(TABLES)}; remove one of them")
    return tables[0] if tables else None


def _unlisted(names: list[str], listed: set[str]) -> Iterator[SampleError]:
    """The images that are not in the table."""
    stems = {split_suffix(name)[0] for name in listed}
    used = listed | {stem + suffix for stem in stems for suffix in (MASK_SUFFIX, CONTROL_SUFFIX)}
    for name in names:
        if name not in used and split_suffix(name)[1] in IMAGE_SUFFIXES:
            yield SampleError("hidden file" if is_hidden(name) else "not in the table", name)
