"""The index of one tar file in WebDataset's layout: which samples it holds, and where.

Each sample is `<key>.jpg` (or jpeg, png, webp), `<key>.txt` and, if there is one, `<key>.json`, as
img2dataset writes them; a list `captions` in the json stands for the txt. The headers are read
once; after that any image is one `os.pread` away.
"""

import json
import os
import tarfile
from pathlib import PurePosixPath
from typing import Any

from wuerstchen_pl.data.sources.metadata import parse_captions, parse_scores
from wuerstchen_pl.data.sources.source import Sample, SampleError, ShardIndex
from wuerstchen_pl.io.images import IMAGE_SUFFIXES, upright_size

_LONGEST_SIDE = 1_000_000
_HEADER = 1 << 16  # bytes in which the size of an image is nearly always found

Members = dict[str, tarfile.TarInfo]


def index_tar(path: str, shard: str, expected: int | None = None) -> ShardIndex:
    """List the samples of a tar file; what is damaged or missing is reported, never raised.

    Args:
        path: of the file.
        shard: the name that its samples bear.
        expected: how many samples a manifest says it holds.
    """
    bad: list[SampleError] = []
    try:
        with open(path, "rb") as file:
            groups, repeated, damage = _groups(path, file.fileno())
            samples = []
            for key, members in groups.items():
                sample = _sample(file.fileno(), shard, key, members)
                if isinstance(sample, Sample):
                    samples.append(sample)
                else:
                    bad.append(SampleError(sample, f"{shard}/{key}"))
    except (OSError, ValueError) as error:  # a name may hold what no name can
        return ShardIndex(
            [], [SampleError("unreadable shard", f"{shard}: {error}", expected or 1)], True
        )
    bad += [SampleError("repeated name", f"{shard}/{name}") for name in repeated]
    if damage is not None:
        bad.append(SampleError("damaged shard", f"{shard}: {damage}"))
    if expected is not None and len(groups) < expected:
        lost = expected - len(groups)
        where = f"{shard}: {lost} of {expected} samples of its manifest are not there"
        bad.append(SampleError("lost samples", where, lost))
    return ShardIndex(samples, bad, broken=damage is not None)


def _groups(path: str, descriptor: int) -> tuple[dict[str, Members], list[str], str | None]:
    """Group the members of a tar file as WebDataset does: by the name up to its first dot.

    Returns:
        The groups as far as the file can be read, names that come again, of which the last counts,
        and what is wrong with the file or None.
    """
    groups: dict[str, Members] = {}
    repeated: list[str] = []
    length, end, last = os.fstat(descriptor).st_size, 0, -1
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # a negative size would lead back, and round for ever
                if member.size < 0 or member.offset <= last:
                    return groups, repeated, f"it is damaged at byte {member.offset}"
                last = member.offset
                if member.offset_data + member.size > length:
                    return groups, repeated, f"it is cut short in {member.name!r}"
                stem, _, suffix = PurePosixPath(member.name).name.partition(".")
                name = str(PurePosixPath(member.name).parent / stem)
                kinds = groups.setdefault(name, {}) if member.isfile() else {}
                if suffix.lower() in kinds:
                    repeated.append(member.name)
                kinds[suffix.lower()] = member
            end = tar.offset
    except OSError:
        raise
    except Exception as error:  # whatever a damaged header makes Python stumble over
        return groups, repeated, f"it is not a whole, uncompressed tar file ({error})"
    # tarfile takes a damaged header in mid-file for the end and loses the rest in silence; a true
    # end is a block of zeros.
    block = os.pread(descriptor, tarfile.BLOCKSIZE, end)
    if not block or any(block):
        return groups, repeated, f"it is damaged or cut short at byte {end}"
    return groups, repeated, None


def _sample(descriptor: int, shard: str, key: str, members: Members) -> Sample | str:
    """Make a sample of its members, or say what is wrong with it."""
    image = next((members[kind] for kind in IMAGE_SUFFIXES if kind in members), None)
    if image is None:
        return "no image"
    if "txt" not in members:
        return "no caption"
    try:
        caption = read(descriptor, members["txt"]).decode().strip()
    except UnicodeDecodeError:
        return "caption is not UTF-8"
    metadata = _facts(descriptor, members)
    size = size_of_json(metadata) or size_of_image(descriptor, image)
    if size is None:
        return "unreadable image"
    captions = parse_captions(metadata.get("captions")) or (caption,)
    place = image.offset_data, image.size
    return Sample(
        key, captions, *size, shard, *place, group_key=key, metadata=parse_scores(metadata)
    )


def _facts(descriptor: int, members: Members) -> dict[str, Any]:
    try:
        metadata = json.loads(read(descriptor, members["json"])) if "json" in members else {}
    except (ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def size_of_json(metadata: dict[str, Any]) -> tuple[int, int] | None:
    """Return (width, height) as img2dataset's json gives them, or None."""
    for prefix in ("", "original_"):
        width, height = (metadata.get(f"{prefix}{side}") for side in ("width", "height"))
        if not (isinstance(width, int) and isinstance(height, int)):
            continue
        if min(width, height) > 0 and max(width, height) <= _LONGEST_SIDE:
            return width, height
    return None


def size_of_image(descriptor: int, image: tarfile.TarInfo) -> tuple[int, int] | None:
    """Return (width, height) from the image's own header, upright, or None."""
    head = os.pread(descriptor, min(_HEADER, image.size), image.offset_data)
    return upright_size(head) or upright_size(read(descriptor, image))


def read(descriptor: int, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a member."""
    return os.pread(descriptor, member.size, member.offset_data)
