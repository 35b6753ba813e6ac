"""Which files are a sample; the rule is the same for folders and tar files.

A sample is an image, its caption (``.txt`` or ``.caption``) and optionally its metadata
(``.json``): files with the same name up to the last dot. Suffixes may be upper case. Hidden files
are not read, as macOS writes ``._a.jpg`` beside ``a.jpg``. Of several images with one name, the
first of ``IMAGE_SUFFIXES`` is used. ``a.mask.png`` is the mask of the sample ``a``, and
``a.control.png`` its control image. As in WebDataset, other images such as ``a.depth.png``, without
a caption of their own, belong to that sample too, and are not used.
"""

from collections.abc import Iterable
from typing import NamedTuple

from wuerstchen_pl.data.sources.source import SampleError
from wuerstchen_pl.io.image_files import (
    CONTROL_SUFFIX,
    IMAGE_SUFFIXES,
    MASK_SUFFIX,
    OTHER_SUFFIXES,
    is_hidden,
    split_suffix,
)

CAPTION_SUFFIXES = ("txt", "caption")
METADATA_SUFFIXES = ("json",)
_READ = (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES, *METADATA_SUFFIXES)


class SampleFiles(NamedTuple):
    """The names of a sample's files; ``key`` is the image's name without its suffix."""

    key: str
    image: str
    caption: str | None
    metadata: str | None


def group_files(names: Iterable[str]) -> tuple[list[SampleFiles], list[SampleError]]:
    """Group files into samples.

    Args:
        names: paths separated by "/", relative to the folder or tar file.

    Returns:
        The samples in the order of their first files, and the images and captions that are not part
        of one.
    """
    groups: dict[str, list[str]] = {}
    unused: list[SampleError] = []
    for name in names:
        key, suffix = split_suffix(name)
        if suffix not in _READ and suffix not in OTHER_SUFFIXES:
            continue
        if not is_hidden(name):
            groups.setdefault(key, []).append(name)
        elif suffix in IMAGE_SUFFIXES:
            unused.append(SampleError("hidden file", name))
    samples = []
    for key, members in groups.items():
        captions = _of_kind(members, CAPTION_SUFFIXES)
        images = _of_kind(members, IMAGE_SUFFIXES + OTHER_SUFFIXES)
        images = [name for name in images if captions or not _is_beside(name, groups)]
        metadata = _of_kind(members, METADATA_SUFFIXES)
        if not images:
            unused += [SampleError("no image", name) for name in captions[:1]]
        elif not captions and _is_field(key, groups):
            unused += [SampleError("additional image", name) for name in images]
        elif split_suffix(images[0])[1] in OTHER_SUFFIXES:
            unused += [SampleError("unsupported image format", name) for name in images]
        else:
            caption, metadata_file = next(iter(captions), None), next(iter(metadata), None)
            samples.append(SampleFiles(key, images[0], caption, metadata_file))
            unused += [SampleError("additional image", name) for name in images[1:]]
    return samples, unused


def _of_kind(names: list[str], suffixes: tuple[str, ...]) -> list[str]:
    """The names with one of these suffixes, in the order of the suffixes."""
    named = [name for name in names if split_suffix(name)[1] in suffixes]
    return sorted(named, key=lambda name: suffixes.index(split_suffix(name)[1]))


def _is_beside(name: str, groups: dict[str, list[str]]) -> bool:
    """Whether a file is the mask or the control image of a sample."""
    ends = (suffix for suffix in (MASK_SUFFIX, CONTROL_SUFFIX) if name.endswith(suffix))
    members = [member for end in ends for member in groups.get(name.removesuffix(end), ())]
    return any(split_suffix(member)[1] in IMAGE_SUFFIXES for member in members)


def _is_field(key: str, groups: dict[str, list[str]]) -> bool:
    """Whether files are an additional field of a sample, in WebDataset's naming."""
    folder, slash, name = key.rpartition("/")
    sample, dot, _ = name.partition(".")
    members = groups.get(f"{folder}{slash}{sample}", ()) if dot else ()
    return any(split_suffix(member)[1] in IMAGE_SUFFIXES for member in members)
