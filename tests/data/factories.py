"""Images and shards that tests make."""

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
    """A JPEG of noise that only this key has."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4])
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise), **options)


def sample(key: str, width: int = 30, height: int = 20, **metadata: Any) -> dict[str, bytes]:
    """The members of one sample, as img2dataset writes them."""
    known = {"width": width, "height": height, "status": "success", **metadata}
    return {
        f"{key}.jpg": image(key, width, height),
        f"{key}.txt": f"an image of {key}".encode(),
        f"{key}.json": json.dumps(known).encode(),
    }


def write(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def shards(folder: Path, count: int, each: int, first: int = 0) -> list[str]:
    """Write shards of samples of several shapes; returns their keys."""
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


class Listed:
    """A source of samples without images: what the order is made of."""

    def __init__(self, opened: dict[str, ShardIndex]) -> None:
        self.opened = opened
        self.asked: list[str] = []

    @classmethod
    def of(cls, sizes: dict[str, int], **same: Any) -> "Listed":
        shapes = [*SHAPES, (20, 40)]
        return cls(
            {
                shard: ShardIndex(
                    [listed(shard, i, *shapes[i % len(shapes)], **same) for i in range(n)]
                )
                for shard, n in sizes.items()
            }
        )

    def prepare(self) -> None:
        pass

    def groups(self, split: Split) -> list[ShardGroup]:
        return [ShardGroup(1.0, list(self.opened))] if split == "train" else []

    def open(self, shard: str) -> ShardIndex:
        self.asked.append(shard)
        return self.opened[shard]

    def read(self, sample: Sample) -> bytes:
        return image(sample.name, sample.width, sample.height)


def listed(shard: str, number: int, width: int = 40, height: int = 40, **more: Any) -> Sample:
    settings: dict[str, Any] = {"captions": ("a word",), "group_key": f"{shard}/{number}"} | more
    return Sample(key=f"{number:04d}", width=width, height=height, shard=shard, **settings)
