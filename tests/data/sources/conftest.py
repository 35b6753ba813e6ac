"""A folder of shards, and a folder of images."""

from pathlib import Path

import pytest

from tests.data.factories import image, sample, write


@pytest.fixture
def shard_folder(tmp_path: Path) -> Path:
    write(tmp_path / "00000.tar", sample("000000000", 30, 20) | sample("000000001", 10, 40))
    write(tmp_path / "00001.tar", sample("000010000", 16, 16))
    return tmp_path


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for name in ("b.jpg", "a.png", "more/c.JPG"):
        (root / name).write_bytes(image(name, 30, 20))
        (root / name).with_suffix(".txt").write_text(f" caption of {name}\n")
    return root
