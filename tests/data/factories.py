"""Builds images, samples and shards for tests."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wuerstchen_pl.data.sources.source import Sample, ShardGroup, ShardIndex, Split

SHAPES = ((48, 32), (32, 48), (40, 40), (64, 32), (36, 36))


def encode(img: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    img.save(buffer, kind, **options)
    return buffer.getvalue()


def image(key: str, width: int = 30, height: int = 20, **options: Any) -> bytes:
    """A JPEG of noise that is unique to this key."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4])
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise), **options)


def photo(width: int, height: int) -> Image.Image:
    """A smooth image with some edges, like a photograph."""
    y, x = np.mgrid[:height, :width] / 64
    waves = [np.sin(a * x + b * y + c) for a, b, c in ((1, 2, 0), (3, 1, 1), (2, 5, 2))]
    pixels = np.stack(waves, axis=-1) * 100 + 127 + 40 * (waves[0] > 0.5)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def sample(key: str, width: int = 30, height: int = 20, **metadata: Any) -> dict[str, bytes]:
    """The members of one sample, as img2dataset writes them."""
    fields = {"width": width, "height": height, "status": "success", **metadata}
    return {
        f"{key}.jpg": image(key, width, height),
        f"{key}.txt": f"an image of {key}".encode(),
        f"{key}.json": json.dumps(fields).encode(),
    }


def write(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def shards(folder: Path, count: int, each: int, first: int = 0) -> list[str]:
    """Write ``count`` shards of ``each`` samples of several shapes; return their keys."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = []
    for number in range(count):
        members: dict[str, bytes] = {}
        for i in range(each):
            key = f"{first + number * each + i:06d}"
            keys.append(key)
            members |= sample(key, *SHAPES[(number + i) % len(SHAPES)])
        write(folder / f"{number:05d}.tar", members)
    return keys


class FakeSource:
    """A source of in-memory samples; its images are generated when they are read."""

    def __init__(self, indexes: dict[str, ShardIndex]) -> None:
        self.indexes = indexes
        self.opened: list[str] = []

    @classmethod
    def with_sizes(cls, sizes: dict[str, int], **fields: Any) -> "FakeSource":
        shapes = [*SHAPES, (20, 40)]
        return cls(
            {
                shard: ShardIndex(
                    [fake_sample(shard, i, *shapes[i % len(shapes)], **fields) for i in range(n)]
                )
                for shard, n in sizes.items()
            }
        )

    def prepare(self) -> None:
        pass

    def groups(self, split: Split) -> list[ShardGroup]:
        return [ShardGroup(1.0, list(self.indexes))] if split == "train" else []

    def open(self, shard: str) -> ShardIndex:
        self.opened.append(shard)
        return self.indexes[shard]

    def read(self, sample: Sample) -> bytes:
        return image(sample.name, sample.width, sample.height)


def fake_sample(
    shard: str, number: int, width: int = 40, height: int = 40, **changes: Any
) -> Sample:
    fields: dict[str, Any] = {"captions": ("a word",), "group_key": f"{shard}/{number}"} | changes
    return Sample(key=f"{number:04d}", width=width, height=height, shard=shard, **fields)
