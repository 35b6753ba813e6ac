"""Writes and scans tar files in WebDataset's layout: their samples and byte offsets.

A sample is ``<key>.jpg`` (or jpeg, png, webp), ``<key>.txt`` and optionally ``<key>.json``, as
written by img2dataset; a list ``captions`` in the json overrides the txt. The tar headers are read
once; any image can then be read with one ``os.pread``.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from wuerstchen_pl.data.sources.metadata import parse_captions, parse_scores
from wuerstchen_pl.data.sources.source import Sample, SampleError, ShardIndex
from wuerstchen_pl.io.images import IMAGE_SUFFIXES, upright_size

LONGEST_SIDE = 1_000_000
"""In pixels; a larger side in the json is not believed."""
REPEATED_NAME, DAMAGED = "repeated name", "damaged shard"
"""Reasons of a ``SampleError`` that is not about one sample."""
_HEADER = 1 << 16  # bytes that nearly always include the size of an image

Members = dict[str, tarfile.TarInfo]


@contextmanager
def tar_writer(path: Path) -> Iterator[TarWriter]:
    """Write a shard with webdataset; equal samples give equal bytes."""
    options: Any = {"encoder": False, "user": "", "group": "", "mode": 0o644, "mtime": 0}
    with path.open("wb") as file, TarWriter(file, **options) as writer:
        yield writer


def scan_tar(path: str, shard: str) -> ShardIndex:
    """The samples of a tar file, from all its headers.

    Args:
        path: path of the file.
        shard: shard name to set in its samples.

    Raises:
        OSError: the file cannot be read; damage to its contents is reported in the result.
        ValueError: the path is invalid.
    """
    samples: list[Sample] = []
    bad: list[SampleError] = []
    with open(path, "rb") as file:
        groups, repeated, damage = _group_members(path, file.fileno())
        for key, members in groups.items():
            sample = _sample(file.fileno(), shard, key, members)
            if isinstance(sample, Sample):
                samples.append(sample)
            else:
                bad.append(SampleError(sample, f"{shard}/{key}"))
    bad += [SampleError(REPEATED_NAME, f"{shard}/{name}") for name in repeated]
    if damage is not None:
        bad.append(SampleError(DAMAGED, f"{shard}: {damage}"))
    return ShardIndex(samples, bad, broken=damage is not None)


def _group_members(path: str, descriptor: int) -> tuple[dict[str, Members], list[str], str | None]:
    """The members of a tar file, grouped by WebDataset's key: the name up to its first dot.

    Returns:
        The groups up to the first damage, repeated names (the last member is used), and a
        description of the damage or None.
    """
    groups: dict[str, Members] = {}
    repeated: list[str] = []
    length, end, last = os.fstat(descriptor).st_size, 0, -1
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # A negative size would seek back and loop forever.
                if member.size < 0 or member.offset <= last:
                    return groups, repeated, f"damaged at byte {member.offset}"
                last = member.offset
                if member.offset_data + member.size > length:
                    return groups, repeated, f"truncated in {member.name!r}"
                key, suffix = base_plus_ext(member.name)
                if key is None or not member.isfile():
                    continue
                kinds = groups.setdefault(key, {})
                if suffix.lower() in kinds:
                    repeated.append(member.name)
                kinds[suffix.lower()] = member
            end = tar.offset
    except OSError:
        raise
    except Exception as error:  # a damaged header can raise almost anything
        return groups, repeated, f"not a complete, uncompressed tar file ({error})"
    # tarfile takes a damaged header within the file for its end and silently drops the rest; the
    # real end is a block of zeros.
    block = os.pread(descriptor, tarfile.BLOCKSIZE, end)
    if not block or any(block):
        return groups, repeated, f"damaged or truncated at byte {end}"
    return groups, repeated, None


def _sample(descriptor: int, shard: str, key: str, members: Members) -> Sample | str:
    """The sample of these members, or the reason why it cannot be used."""
    image = next((members[kind] for kind in IMAGE_SUFFIXES if kind in members), None)
    if image is None:
        return "no image"
    if "txt" not in members:
        return "no caption"
    try:
        caption = read_member(descriptor, members["txt"]).decode().strip()
    except UnicodeDecodeError:
        return "caption is not UTF-8"
    metadata = _read_metadata(descriptor, members)
    size = size_from_metadata(metadata) or size_from_header(descriptor, image)
    if size is None:
        return "unreadable image"
    captions = parse_captions(metadata.get("captions")) or (caption,)
    byte_range = image.offset_data, image.size
    return Sample(
        key, captions, *size, shard, *byte_range, group_key=key, metadata=parse_scores(metadata)
    )


def _read_metadata(descriptor: int, members: Members) -> dict[str, Any]:
    try:
        metadata = json.loads(read_member(descriptor, members["json"])) if "json" in members else {}
    except (ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def size_from_metadata(metadata: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height) from img2dataset's json, or None."""
    for prefix in ("", "original_"):
        width, height = (metadata.get(f"{prefix}{side}") for side in ("width", "height"))
        if not (isinstance(width, int) and isinstance(height, int)):
            continue
        if min(width, height) > 0 and max(width, height) <= LONGEST_SIDE:
            return width, height
    return None


def size_from_header(descriptor: int, image: tarfile.TarInfo) -> tuple[int, int] | None:
    """The upright (width, height) from the image's own header, or None."""
    header = os.pread(descriptor, min(_HEADER, image.size), image.offset_data)
    return upright_size(header) or upright_size(read_member(descriptor, image))


def read_member(descriptor: int, member: tarfile.TarInfo) -> bytes:
    """The bytes of a member."""
    return os.pread(descriptor, member.size, member.offset_data)
