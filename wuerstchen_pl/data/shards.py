"""WebDataset shards on a local disk, read by random access.

The layout is img2dataset's: each sample is `<key>.jpg` (or png, webp), `<key>.txt` and, if there is
one, `<key>.json`. The tar headers are read once; after that any picture is one `os.pread` away, so
that the whole set is shuffled perfectly and a run resumes at any batch without replaying a stream.
"""

import io
import json
import os
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand
from PIL import Image

from wuerstchen_pl.data.source import Sample, Split, check_val_fraction, validation_names

PICTURE_TYPES = ("jpg", "jpeg", "png", "webp")
_MAX_OPEN_SHARDS = 64  # well below the usual limit of 1,024 open files, per worker
_EXIF_ORIENTATION = 0x0112

Urls = str | Sequence[str]


class Shards:
    """An index of the samples in local tar files, and their bytes.

    Attributes:
        samples: the complete samples, in the order of the shards and of their members.
        skipped: how many samples were left out, by reason.
    """

    def __init__(self, *, urls: Urls, key: str = "data.source.urls") -> None:
        """Read the headers, captions and sizes of every shard.

        Args:
            urls: a tar file, a folder of them, a brace pattern, or a list of any of these.
            key: the configuration key that errors name.

        Raises:
            FileNotFoundError: a path does not exist.
            ValueError: an address is not a local path, a shard is damaged, or no sample is left.
        """
        self.paths = expand_urls(urls, key=key)
        self.skipped: dict[str, int] = {}
        self.samples: list[Sample] = []
        self._files = OpenFiles()
        reasons: Counter[str] = Counter()
        for path in self.paths:
            self.samples += _scan(path, reasons, key)
        self.skipped = dict(reasons)
        if not self.samples:
            raise ValueError(
                f"{key}={urls!r} holds no sample with a picture ({', '.join(PICTURE_TYPES)}) and "
                f"a .txt (left out: {self.skipped or 'none'}): "
                "point it at shards in the layout of img2dataset."
            )

    def read(self, sample: Sample) -> bytes:
        """Return the encoded picture of a sample."""
        return self._files.read(sample)


class OpenFiles:
    """Reads the bytes of samples and keeps the last few of their shards open, per process."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, sample: Sample) -> bytes:
        """Return the encoded picture of a sample.

        Raises:
            ValueError: its shard ends before it does.
        """
        data = os.pread(self._descriptor(sample.shard), sample.size, sample.offset)
        if len(data) != sample.size:
            raise ValueError(
                f"{sample.shard} became shorter after it was indexed (sample {sample.key!r}): "
                "write the shard again and restart."
            )
        return data

    def _descriptor(self, path: str) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY)
            if len(self._open) > _MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(path)
        return self._open[path]

    def __reduce__(self) -> tuple[type["OpenFiles"], tuple[()]]:
        # A file descriptor means nothing in another process.
        return OpenFiles, ()

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class ShardSource:
    """A `Source` over local shards.

    Args:
        urls: the training shards: a tar file, a folder, a brace pattern, or a list of these.
        val_urls: shards for validation; if None, they are taken out of `urls` by `val_fraction`.
        val_fraction: expected share of the samples kept for validation, chosen by a hash of the
            key, in [0, 1).
    """

    def __init__(
        self, *, urls: Urls, val_urls: Urls | None = None, val_fraction: float = 0.0
    ) -> None:
        check_val_fraction(val_fraction)
        if val_urls is not None and val_fraction > 0:
            raise ValueError(
                f"data.source.val_urls={val_urls!r} and data.source.val_fraction={val_fraction} "
                "both say what validation uses: set one of them."
            )
        expand_urls(urls, key="data.source.urls", must_exist=False)
        self.urls = urls
        self.val_urls = val_urls
        self.val_fraction = val_fraction
        self._shards: dict[str, Shards] = {}
        self._files = OpenFiles()

    def prepare(self) -> None:
        """Check that the shards exist."""
        expand_urls(self.urls, key="data.source.urls")
        if self.val_urls is not None:
            expand_urls(self.val_urls, key="data.source.val_urls")

    def samples(self, split: Split) -> list[Sample]:
        """List the samples of one split, in the order of the shards."""
        if self.val_urls is not None and split == "val":
            return self._index("data.source.val_urls", self.val_urls).samples
        found = self._index("data.source.urls", self.urls).samples
        chosen = validation_names((sample.key for sample in found), self.val_fraction)
        return [sample for sample in found if (sample.key in chosen) == (split == "val")]

    def read(self, sample: Sample) -> bytes:
        """Return the encoded picture of a sample."""
        return self._files.read(sample)

    @property
    def skipped(self) -> dict[str, int]:
        """How many samples were left out of the shards listed so far, by reason."""
        total: Counter[str] = Counter()
        for shards in self._shards.values():
            total.update(shards.skipped)
        return dict(total)

    def _index(self, key: str, urls: Urls) -> Shards:
        if key not in self._shards:
            self._shards[key] = Shards(urls=urls, key=key)
        return self._shards[key]


def expand_urls(urls: Urls, *, key: str, must_exist: bool = True) -> list[str]:
    """Expand a path, folder, brace pattern or list of these to tar files, in a stable order.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no tar file.
        ValueError: nothing is given, or an address is not a local path.
    """
    patterns = [urls] if isinstance(urls, str) else list(urls)
    paths: list[str] = []
    for pattern in patterns:
        if pattern.startswith("pipe:") or "://" in pattern:
            raise ValueError(
                f"{key}={pattern!r} is not a local path, and nothing else can be read yet: "
                "copy the shards to a disk and give their folder."
            )
        for name in braceexpand(pattern):
            path = Path(name).expanduser()
            tars = sorted(path.glob("*.tar")) if path.is_dir() else [path]
            if must_exist and not (tars and tars[0].exists()):
                raise FileNotFoundError(
                    f"{key}={pattern!r} names {str(path)!r}, where there is no tar file: "
                    "correct the path or build the shards first."
                )
            paths += [str(tar) for tar in tars]
    if not paths and must_exist:
        raise ValueError(f"{key}={urls!r} names no shard: give a tar file, a folder or a pattern.")
    return paths


def _scan(path: str, reasons: Counter[str], key: str) -> Iterator[Sample]:
    """Yield the complete samples of one tar file and count the others in `reasons`."""
    with open(path, "rb") as file:
        descriptor = file.fileno()
        for name, members in _members(path, descriptor, key).items():
            picture = next((members[kind] for kind in PICTURE_TYPES if kind in members), None)
            if picture is None:
                reasons["no picture"] += 1
                continue
            if "txt" not in members:
                reasons["no txt"] += 1
                continue
            try:
                caption = _bytes(descriptor, members["txt"]).decode().strip()
            except UnicodeDecodeError:
                reasons["txt is not UTF-8"] += 1
                continue
            size = _size_from_json(descriptor, members) or _size_from_picture(descriptor, picture)
            if size is None:
                reasons["unreadable picture"] += 1
                continue
            yield Sample(name, caption, *size, path, picture.offset_data, picture.size)


def _members(path: str, descriptor: int, key: str) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Group the members of a tar file as WebDataset does: by the name up to its first dot."""
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, _, suffix = PurePosixPath(member.name).name.partition(".")
                name = str(PurePosixPath(member.name).parent / stem)
                if member.isfile():
                    groups.setdefault(name, {})[suffix.lower()] = member
            end = tar.offset
    except tarfile.ReadError as error:
        raise ValueError(
            f"{key} names {path!r}, which is not a whole, uncompressed tar file ({error}): "
            "write it again or leave it out."
        ) from error
    # tarfile takes a damaged header in mid-file for the end and loses the rest in silence; a true
    # end is a block of zeros.
    block = os.pread(descriptor, tarfile.BLOCKSIZE, end)
    if not block or any(block):
        raise ValueError(
            f"{key} names {path!r}, which is damaged or cut short at byte {end}: "
            "write it again or leave it out."
        )
    return groups


def _size_from_json(descriptor: int, members: dict[str, tarfile.TarInfo]) -> tuple[int, int] | None:
    """Return (width, height) as the json gives them, or None."""
    if "json" not in members:
        return None
    try:
        facts = json.loads(_bytes(descriptor, members["json"]))
    except ValueError:
        return None
    facts = facts if isinstance(facts, dict) else {}
    for prefix in ("", "original_"):
        width, height = facts.get(f"{prefix}width"), facts.get(f"{prefix}height")
        if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0:
            return width, height
    return None


def _size_from_picture(descriptor: int, picture: tarfile.TarInfo) -> tuple[int, int] | None:
    """Return (width, height) from the picture's own header, upright, or None."""
    try:
        with Image.open(io.BytesIO(_bytes(descriptor, picture))) as img:
            turned = img.getexif().get(_EXIF_ORIENTATION, 1) >= 5
            return (img.height, img.width) if turned else img.size
    except OSError:
        return None


def _bytes(descriptor: int, member: tarfile.TarInfo) -> bytes:
    return os.pread(descriptor, member.size, member.offset_data)
