"""Mixtures of sources."""

from pathlib import Path

import pytest

from tests.data.factories import FakeSource, image, shards
from tests.data.sources.reading import samples_and_errors
from wuerstchen_pl.data.sources.folder import FolderSource
from wuerstchen_pl.data.sources.mix import Mix
from wuerstchen_pl.data.sources.shards import ShardSource


def test_a_mixture_reads_from_each_of_its_sources(image_folder: Path, tmp_path: Path) -> None:
    shards(tmp_path / "tars", 2, 3)
    mix = Mix(
        sources={
            "local": FolderSource(root=str(image_folder)),
            "web": ShardSource(urls=str(tmp_path / "tars")),
        },
        weights={"local": 3},
    )
    samples, _ = samples_and_errors(mix)
    assert len({s.name for s in samples}) == len({s.group_key for s in samples}) == 3 + 6
    assert [group.weight for group in mix.groups("train")] == [3, 1]
    expected = [image(s.key, s.width, s.height) for s in samples]
    assert [mix.read(s) for s in samples] == expected


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ({}, None, r"sources=\{\} is empty"),
        ({"a": FakeSource({})}, {"b": 1}, r"weights=\{.*\} names 'b', which is not one of"),
        ({"a": FakeSource({})}, {"a": 0}, r"weights\.a=0 is out of range; use more than 0"),
    ],
)
def test_an_invalid_mixture_is_rejected(sources: dict, weights: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mix(sources=sources, weights=weights)
