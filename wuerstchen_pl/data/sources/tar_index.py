"""The list of a tar file's samples, kept in an index beside it so that it is scanned only once.

``00000.tar.index.json`` is written when ``00000.tar`` is first opened; if its folder is read-only,
to another folder. An index states the size and the modification time of its tar file, and is
replaced if these have changed. It may come from elsewhere with the data, so its values are checked
as those of a tar file are.
"""

import json
import logging
import math
import os
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from wuerstchen_pl.data.sources.metadata import NUMBER_COLUMNS
from wuerstchen_pl.data.sources.source import Sample, SampleError, ShardIndex, name_digest
from wuerstchen_pl.data.sources.tar import DAMAGED, LONGEST_SIDE, REPEATED_NAME, scan_tar
from wuerstchen_pl.io.atomic import write_text
from wuerstchen_pl.plural import plural

_FORMAT = 4  # increment when ``scan_tar`` changes, so that old indexes are not used
_BESIDE = ("mask_offset", "mask_size", "control_offset", "control_size")
_NUMBERS = ("width", "height", "offset", "size", *_BESIDE)
_COLUMNS = ("key", "captions", "metadata", *_NUMBERS)
logger = logging.getLogger(__name__)


def index_tar(
    path: str,
    shard: str,
    expected: int | None = None,
    *,
    index_dir: Path | None = None,
    caption_lines: bool = False,
) -> ShardIndex:
    """The samples of a tar file; damage is reported in the result, never raised.

    Args:
        path: path of the file.
        shard: shard name to set in its samples.
        expected: number of samples according to the manifest.
        index_dir: folder of the index if it cannot be written beside the file.
        caption_lines: whether each line of a caption file is a caption.
    """
    try:
        # Before the scan: a file that changes during it does not match its index.
        state = _state(path) | {"caption_lines": caption_lines}
        index_paths = list(_index_paths(Path(path), index_dir))
        indexes = (_read(index_path, shard, state) for index_path in index_paths)
        opened = next((index for index in indexes if index is not None), None)
        if opened is None:
            opened = scan_tar(path, shard, caption_lines=caption_lines)
            if not opened.broken:
                _write(index_paths, opened, shard, state)
    except (OSError, ValueError) as error:  # ValueError: an invalid path
        return ShardIndex(
            [], [SampleError("unreadable shard", f"{shard}: {error}", expected or 1)], True
        )
    if expected is not None and (lost := expected - _num_listed(opened)) > 0:
        where = f"{shard}: lacks {lost} of {plural(expected, 'sample')} of its manifest"
        opened.bad.append(SampleError("lost samples", where, lost))
    return opened


def index_path(tar: Path) -> Path:
    """The path of the index beside a tar file."""
    return tar.with_name(f"{tar.name}.index.json")


def _index_paths(tar: Path, index_dir: Path | None) -> Iterator[Path]:
    """The possible paths of an index, in the order in which they are tried."""
    yield index_path(tar)
    if index_dir is not None:
        yield index_dir / f"{name_digest(str(tar.absolute())).hex()[:24]}.index.json"


def _state(path: str) -> dict[str, int]:
    """What an index must state to be used."""
    status = os.stat(path)
    return {"format": _FORMAT, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _write(paths: list[Path], opened: ShardIndex, shard: str, state: dict[str, int]) -> None:
    """Write an index to the first path that can be written, if any."""
    columns = {name: [getattr(s, name) for s in opened.samples] for name in _COLUMNS}
    bad = [[error.reason, error.where.removeprefix(f"{shard}/")] for error in opened.bad]
    text = json.dumps({**state, **columns, "bad": bad})
    for path in paths:
        try:
            write_text(path, text)
        except OSError:
            continue
        return
    _log_unwritable()


@cache  # once per process
def _log_unwritable() -> None:
    logger.info("indexes of shards cannot be written; each shard is scanned whenever it is opened")


def _read(path: Path, shard: str, state: dict[str, int]) -> ShardIndex | None:
    """Read an index; None if it is missing, invalid, or of another state of the tar file."""
    try:
        content = json.loads(path.read_bytes())
        if any(content[name] != value for name, value in state.items()):
            return None
        return _parse(content, shard, num_bytes=state["bytes"])
    except Exception:  # an index from elsewhere can raise almost anything
        return None


def _parse(content: dict[str, Any], shard: str, *, num_bytes: int) -> ShardIndex:
    """The samples of an index.

    Raises:
        ValueError: a value is invalid; invalid types raise other errors.
    """
    keys, captions, metadata = (content[name] for name in ("key", "captions", "metadata"))
    numbers = np.array([content[name] for name in _NUMBERS], np.int64)
    sides, offsets, sizes = numbers[:2], numbers[2::2], numbers[3::2]
    "".join(keys)  # raises if one is not a string
    "".join(chain.from_iterable(captions)).encode()
    scores = chain.from_iterable(row.values() for row in metadata)
    valid = (
        (sides > 0).all() and (sides <= LONGEST_SIDE).all(),
        (offsets >= 0).all() and (sizes >= 0).all() and (offsets <= num_bytes - sizes).all(),
        all(map(set(NUMBER_COLUMNS).issuperset, metadata)) and all(map(math.isfinite, scores)),
    )
    if not all(valid):
        raise ValueError("an index has a value out of range")
    samples = [
        Sample(key, tuple(texts), width, height, shard, offset, size, key, scores, *beside)
        for key, texts, scores, width, height, offset, size, *beside in zip(
            keys, captions, metadata, *numbers.tolist(), strict=True
        )
    ]
    bad = [SampleError(str(reason), f"{shard}/{name}") for reason, name in content["bad"]]
    return ShardIndex(samples, bad)


def _num_listed(opened: ShardIndex) -> int:
    """The number of samples of a tar file, with the unusable ones."""
    about_shard = (REPEATED_NAME, DAMAGED)
    unusable = (error for error in opened.bad if error.is_bad and error.reason not in about_shard)
    return len(opened.samples) + sum(1 for _ in unusable)
