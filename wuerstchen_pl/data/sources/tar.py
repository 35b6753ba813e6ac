"""Writes and scans tar files in WebDataset's layout: their samples and byte offsets.

A sample is ``<key>.jpg`` (or another image), ``<key>.txt`` and optionally ``<key>.json``, as
written by img2dataset; a list ``captions`` in the json overrides the txt. The tar headers are read
once; any image can then be read with one ``os.pread``.
"""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from wuerstchen_pl.data.sources.metadata import file_captions, parse_metadata, parse_numbers
from wuerstchen_pl.data.sources.sample_files import SampleFiles, group_files
from wuerstchen_pl.data.sources.source import Sample, SampleError, ShardIndex, UnusableSampleError
from wuerstchen_pl.io.image_files import CONTROL_SUFFIX, MASK_SUFFIX
from wuerstchen_pl.io.images import upright_size

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


def scan_tar(path: str, shard: str, *, caption_lines: bool = False) -> ShardIndex:
    """The samples of a tar file, from all its headers.

    Args:
        path: path of the file.
        shard: shard name to set in its samples.
        caption_lines: whether each line of a caption file is a caption.

    Raises:
        OSError: the file cannot be read; damage to its contents is reported in the result.
        ValueError: the path is invalid.
    """
    samples: list[Sample] = []
    with open(path, "rb") as file:
        members, repeated, damage = _read_headers(path, file.fileno())
        groups, unused = group_files(members)
        bad = [SampleError(error.reason, f"{shard}/{error.where}") for error in unused]
        for files in groups:
            try:
                samples.append(_sample(file.fileno(), shard, files, members, caption_lines))
            except UnusableSampleError as error:
                bad.append(SampleError(str(error), f"{shard}/{files.key}"))
    bad += [SampleError(REPEATED_NAME, f"{shard}/{name}") for name in repeated]
    if damage is not None:
        bad.append(SampleError(DAMAGED, f"{shard}: {damage}"))
    return ShardIndex(samples, bad, broken=damage is not None)


def _read_headers(path: str, descriptor: int) -> tuple[Members, list[str], str | None]:
    """The members of a tar file by name, without folders.

    Returns:
        The members up to the first damage, repeated names (the last member is used), and a
        description of the damage or None.
    """
    members: Members = {}
    repeated: list[str] = []
    length, end, last = os.fstat(descriptor).st_size, 0, -1
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # A negative size would seek back and loop forever.
                if member.size < 0 or member.offset <= last:
                    return members, repeated, f"damaged at byte {member.offset}"
                last = member.offset
                is_plain = member.isreg() and not member.issparse()
                if is_plain and member.offset_data + member.size > length:
                    return members, repeated, f"truncated in {member.name!r}"
                if member.isdir():
                    continue
                name = posixpath.normpath(member.name)
                if name in members:
                    repeated.append(name)
                members[name] = member
            end = tar.offset
    except OSError:
        raise
    except Exception as error:  # a damaged header can raise almost anything
        return members, repeated, f"not a complete, uncompressed tar file ({error})"
    # tarfile takes a damaged header within the file for its end and silently drops the rest; the
    # real end is a block of zeros.
    block = os.pread(descriptor, tarfile.BLOCKSIZE, end)
    if not block or any(block):
        return members, repeated, f"damaged or truncated at byte {end}"
    return members, repeated, None


def _sample(
    descriptor: int, shard: str, files: SampleFiles, members: Members, caption_lines: bool
) -> Sample:
    """The sample of these files.

    Raises:
        UnusableSampleError: it cannot be used.
    """
    image, caption, metadata_file = (_find(members, name) for name in files[1:])
    if image is None:
        raise UnusableSampleError("no image")
    metadata = parse_metadata(_read(descriptor, metadata_file))
    captions = file_captions(_read(descriptor, caption), metadata, by_line=caption_lines)
    size = size_from_metadata(metadata) or size_from_header(descriptor, image)
    if size is None:
        raise UnusableSampleError("unreadable image")
    mask, control = (_find(members, files.key + end) for end in (MASK_SUFFIX, CONTROL_SUFFIX))
    return Sample(
        files.key,
        captions,
        *size,
        shard,
        offset=image.offset_data,
        size=image.size,
        group_key=files.key,
        metadata=parse_numbers(metadata),
        mask_offset=0 if mask is None else mask.offset_data,
        mask_size=0 if mask is None else mask.size,
        control_offset=0 if control is None else control.offset_data,
        control_size=0 if control is None else control.size,
    )


def _find(members: Members, name: str | None) -> tarfile.TarInfo | None:
    """The file of this name in a tar file, through links; None if it is not there."""
    passed: set[str] = set()
    while name is not None and name in members and name not in passed:
        passed.add(name)
        member = members[name]
        if member.isreg() and not member.issparse():
            return member
        if member.issym():
            name = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        else:
            name = posixpath.normpath(member.linkname) if member.islnk() else None
    return None


def _read(descriptor: int, member: tarfile.TarInfo | None) -> bytes | None:
    return None if member is None else read_member(descriptor, member)


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
