"""What a cache holds of sources of every kind, with networks that are simple sums."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.factories import SHAPES, image, sample, write
from wuerstchen_pl.data.caches import build_cache as build_cache_module
from wuerstchen_pl.data.caches.build_cache import build_cache
from wuerstchen_pl.data.caches.cached_dataset import PREPROCESSING, CachedDataModule
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.sources.shards import ShardSource

pytestmark = pytest.mark.filterwarnings("ignore:left out:UserWarning")


class Sums:
    """What stands for the networks: sums of pixels, and lengths of captions."""

    def images(self, images: Tensor) -> dict[str, Tensor]:
        return {"semantic": images.double().mean((2, 3), keepdim=True).float()}

    def captions(self, captions: list[str]) -> Tensor | None:
        return torch.tensor([[[float(len(caption))]] for caption in captions])


def module(folder: Path, **changes: Any) -> ImageTextDataModule:
    settings: dict[str, Any] = {"image_size": 32, "batch_size": 3, "bucket_multiple": 16}
    settings |= {"val_fraction": 0.0, "crop": "center", "max_bad_fraction": 1.0} | changes
    data = ImageTextDataModule(source=ShardSource(urls=str(folder)), **settings)
    data.prepare_data()
    data.setup()
    return data


def cached(data: ImageTextDataModule, out: Path, crops: int = 1, **place: int) -> list[str]:
    out.mkdir(exist_ok=True)
    settings = {"preprocessing": PREPROCESSING, "tensors": ["semantic"], "crops": crops}
    settings |= {"sizes": [list(size) for size in data.sizes], "text": True, "made_with": {}}
    return build_cache(data, Sums(), out, settings=settings, crops=crops, shard_mb=1, **place)


def rows(data: ImageTextDataModule) -> list[tuple[str, str, float]]:
    """(key, caption, sum of the pixels) of every training sample, from images or from a cache."""
    found = []
    for batch in data.in_order("train"):
        made = (
            batch["semantic"] if "semantic" in batch else Sums().images(batch["image"])["semantic"]
        )
        if "text" in batch:
            assert batch["text"].flatten().tolist() == [len(c) for c in batch["caption"]]
        sums = [round(value, 5) for value in made.mean((1, 2, 3)).tolist()]
        found += list(zip(batch["key"], batch["caption"], sums, strict=True))
    return sorted(found)


def read(out: Path) -> ImageTextDataModule:
    data = CachedDataModule(root=str(out), batch_size=3)
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with the same keys, an image that comes twice, and one that is cut short."""
    (tmp_path / "tars").mkdir()
    for shard in "ab":
        members: dict[str, bytes] = {}
        for i, shape in enumerate(SHAPES):
            made = sample(f"{i}", *shape, captions=[f"{shard} {i}", "another"])
            made[f"{i}.jpg"] = image(f"{shard}{i}", *shape)
            members |= made
        write(tmp_path / f"tars/{shard}.tar", members | twice(shard) | cut())
    return tmp_path / "tars"


def twice(shard: str) -> dict[str, bytes]:
    made = sample("twice", 40, 40, caption=shard)
    return made | {"twice.txt": f"{shard} twice".encode()}


def cut() -> dict[str, bytes]:
    made = sample("cut", 40, 40)
    return made | {"cut.jpg": made["cut.jpg"][:300]}


def test_a_cache_holds_what_in_order_gives_of_shards_with_the_same_keys(
    folder: Path, tmp_path: Path
) -> None:
    data = module(folder)
    assert cached(data, tmp_path / "out") == []
    expected = rows(data)
    assert len(expected) == 12
    assert len({value for _, _, value in expected}) == 11
    assert rows(read(tmp_path / "out")) == expected
    assert data.splits.stats.counts["bad/unreadable image"] == 2


def test_an_image_that_comes_again_is_left_out(folder: Path, tmp_path: Path) -> None:
    data = module(folder, filters=Filters(deduplicate=True))
    assert cached(data, tmp_path / "out") == []
    assert data.splits.stats.counts["dropped/duplicate"] == 2  # the one that is cut short, too
    found = rows(read(tmp_path / "out"))
    assert sum(key == "twice" for key, _, _ in found) == 1
    assert len(found) == 11


def test_several_crops_and_captions_of_an_image_stay_together(folder: Path, tmp_path: Path) -> None:
    data = module(folder, crop="random")
    assert cached(data, tmp_path / "out", crops=3) == []
    seen: dict[str, set[float]] = {}
    drawn: dict[str, set[str]] = {}
    loader = read(tmp_path / "out").train_dataloader()
    for batch in [batch for _ in range(40) for batch in loader]:
        assert batch["text"].flatten().tolist() == [len(c) for c in batch["caption"]]
        for caption, key, made in zip(
            batch["caption"], batch["key"], batch["semantic"], strict=True
        ):
            if caption != "another":
                seen.setdefault(caption, set()).add(round(made.mean().item(), 6))
            drawn.setdefault(key, set()).add(caption)
    assert max(map(len, seen.values())) == 3
    assert drawn["3"] == {"a 3", "b 3", "another"}


def test_a_shard_that_could_not_be_read_is_tried_again(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(b"garbage")
    assert cached(module(folder), tmp_path / "out") == [str(folder / "b.tar")]
    assert len(rows(read(tmp_path / "out"))) == 6
    (folder / "b.tar").write_bytes(whole)
    data = module(folder)
    assert cached(data, tmp_path / "out") == []
    assert rows(read(tmp_path / "out")) == rows(data)


def test_copies_are_left_out_of_a_cache_that_was_stopped_in_between(
    folder: Path, tmp_path: Path
) -> None:
    settings = {"filters": Filters(deduplicate=True)}
    cached(module(folder, **settings), tmp_path / "out")
    whole = rows(read(tmp_path / "out"))
    (tmp_path / "out/train-00001.json").unlink()
    for path in (tmp_path / "out").glob("train-00001-*"):
        path.unlink()
    cached(module(folder, **settings), tmp_path / "out")
    assert rows(read(tmp_path / "out")) == whole


def test_validation_is_made_again_when_it_has_grown(folder: Path, tmp_path: Path) -> None:
    def held_out(data: ImageTextDataModule) -> set[str]:
        return {caption for batch in data.val_dataloader() for caption in batch["caption"]}

    whole = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(b"garbage")
    cached(module(folder, val_fraction=0.4), tmp_path / "out")
    fewer = held_out(read(tmp_path / "out"))
    (folder / "b.tar").write_bytes(whole)
    data = module(folder, val_fraction=0.4)
    cached(data, tmp_path / "out")
    assert held_out(read(tmp_path / "out")) == held_out(data)
    assert fewer < held_out(data)


def test_processes_that_end_together_do_not_disturb_each_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(module(folder), tmp_path / "out")
    modules, gate = [module(folder) for _ in range(4)], threading.Barrier(4)
    save = build_cache_module.save_file

    def together(*arguments: Any) -> None:
        save(*arguments)
        gate.wait(timeout=20)  # all have written, and none has named its file yet

    monkeypatch.setattr(build_cache_module, "save_file", together)
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda data: cached(data, tmp_path / "out", world_size=4), modules)
        assert list(found) == [[], [], [], []]
    assert rows(read(tmp_path / "out")) == rows(module(folder))


def test_two_processes_share_the_shards_and_the_last_one_finds_it_whole(
    folder: Path, tmp_path: Path
) -> None:
    first = cached(module(folder), tmp_path / "out", rank=0, world_size=2)
    assert [Path(name).name for name in first] == ["b.tar"]
    assert not (tmp_path / "out/cache.json").exists()
    assert cached(module(folder), tmp_path / "out", rank=1, world_size=2) == []
    assert rows(read(tmp_path / "out")) == rows(module(folder))


def test_nothing_to_cache_is_said(folder: Path, tmp_path: Path) -> None:
    data = module(folder, filters=Filters(min_words=1, forbidden_words=["a", "b", "another", "of"]))
    with pytest.raises(ValueError, match="nothing is left to train on"):
        cached(data, tmp_path / "out")
    assert not (tmp_path / "out/cache.json").exists()
