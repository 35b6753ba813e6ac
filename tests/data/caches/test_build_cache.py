"""Building and reading caches, with simple sums in place of the networks."""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.factories import SHAPES, image, sample, write
from wuerstchen_pl.data.caches import build_cache as build_cache_module
from wuerstchen_pl.data.caches.build_cache import build_cache
from wuerstchen_pl.data.caches.cache_files import PREPROCESSING
from wuerstchen_pl.data.caches.cached_dataset import CachedDataModule
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.loading.captions import Captions
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.sources.shards import ShardSource

pytestmark = pytest.mark.filterwarnings("ignore:skipped:UserWarning")


class Sums:
    """Stand-ins for the networks: means of pixels, and lengths of captions."""

    def images(self, images: Tensor) -> dict[str, Tensor]:
        return {"semantic": images.double().mean((2, 3), keepdim=True).float()}

    def captions(self, captions: list[str]) -> Tensor | None:
        return torch.tensor([[[float(len(caption))]] for caption in captions])


class SumsWithoutText(Sums):
    def captions(self, captions: list[str]) -> None:
        return None


def module(folder: Path, **changes: Any) -> ImageTextDataModule:
    settings: dict[str, Any] = {"image_size": 32, "batch_size": 3, "bucket_multiple": 16}
    settings |= {"val_fraction": 0.0, "crop": "center", "max_bad_fraction": 1.0} | changes
    data = ImageTextDataModule(source=ShardSource(urls=str(folder)), **settings)
    data.prepare_data()
    data.setup()
    return data


def cached(
    data: ImageTextDataModule,
    out: Path,
    crops: int = 1,
    rank: int = 0,
    world_size: int = 1,
    text: bool = True,
) -> list[str]:
    out.mkdir(exist_ok=True)
    settings = {"preprocessing": PREPROCESSING, "tensors": ["semantic"], "crops": crops}
    settings |= {"sizes": [list(size) for size in data.sizes], "text": text, "made_with": {}}
    return build_cache(
        data,
        Sums() if text else SumsWithoutText(),
        out,
        settings=settings,
        crops=crops,
        shard_mb=1,
        rank=rank,
        world_size=world_size,
    )


def rows(data: ImageTextDataModule) -> list[tuple[str, str, float]]:
    """(key, caption, mean of the pixels) of every training sample, from images or from a cache."""
    result = []
    for batch in data.in_order("train"):
        encoded = (
            batch["semantic"] if "semantic" in batch else Sums().images(batch["image"])["semantic"]
        )
        if "text" in batch:
            assert batch["text"].flatten().tolist() == [len(c) for c in batch["caption"]]
        means = [round(value, 5) for value in encoded.mean((1, 2, 3)).tolist()]
        result += list(zip(batch["key"], batch["caption"], means, strict=True))
    return sorted(result)


def read_cache(out: Path) -> ImageTextDataModule:
    data = CachedDataModule(root=str(out), batch_size=3)
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with the same keys, a duplicate image, and a truncated one."""
    (tmp_path / "tars").mkdir()
    for shard in "ab":
        members: dict[str, bytes] = {}
        for i, shape in enumerate(SHAPES):
            entry = sample(f"{i}", *shape, captions=[f"{shard} {i}", "another"])
            entry[f"{i}.jpg"] = image(f"{shard}{i}", *shape)
            members |= entry
        write(tmp_path / f"tars/{shard}.tar", members | duplicate(shard) | truncated())
    return tmp_path / "tars"


def duplicate(shard: str) -> dict[str, bytes]:
    members = sample("twice", 40, 40, caption=shard)
    return members | {"twice.txt": f"{shard} twice".encode()}


def truncated() -> dict[str, bytes]:
    members = sample("cut", 40, 40)
    return members | {"cut.jpg": members["cut.jpg"][:300]}


def test_a_cache_matches_in_order_for_shards_with_equal_keys(folder: Path, tmp_path: Path) -> None:
    data = module(folder)
    assert cached(data, tmp_path / "out") == []
    expected = rows(data)
    assert len(expected) == 12
    assert len({value for _, _, value in expected}) == 11
    assert rows(read_cache(tmp_path / "out")) == expected
    assert data.splits.stats.counts["bad/unreadable image"] == 2


def test_duplicate_images_are_dropped(folder: Path, tmp_path: Path) -> None:
    data = module(folder, filters=Filters(deduplicate=True))
    assert cached(data, tmp_path / "out") == []
    assert data.splits.stats.counts["dropped/duplicate"] == 2  # including the truncated one
    cached_rows = rows(read_cache(tmp_path / "out"))
    assert sum(key == "twice" for key, _, _ in cached_rows) == 1
    assert len(cached_rows) == 11


def test_several_crops_and_captions_of_an_image_stay_together(folder: Path, tmp_path: Path) -> None:
    data = module(folder, crop="random")
    assert cached(data, tmp_path / "out", crops=3) == []
    seen: dict[str, set[float]] = {}
    drawn: dict[str, set[str]] = {}
    loader = read_cache(tmp_path / "out").train_dataloader()
    for batch in [batch for _ in range(40) for batch in loader]:
        assert batch["text"].flatten().tolist() == [len(c) for c in batch["caption"]]
        for caption, key, encoded in zip(
            batch["caption"], batch["key"], batch["semantic"], strict=True
        ):
            if caption != "another":
                seen.setdefault(caption, set()).add(round(encoded.mean().item(), 6))
            drawn.setdefault(key, set()).add(caption)
    assert max(map(len, seen.values())) == 3
    assert drawn["3"] == {"a 3", "b 3", "another"}


def test_captions_of_cached_latents_change_in_training(tmp_path: Path) -> None:
    tags = {f"{i}.txt": b"a, b, c, d, e, f" for i in range(1, 9)}
    members = {k: v for i in range(9) for k, v in sample(f"{i}", 40, 40).items()} | tags
    write(tmp_path / "tags.tar", members | {"0.txt": b""})
    captions = Captions(shuffle_tags=True, drop_tag_prob=0.3, trigger="sks", default="g, h")
    data = module(tmp_path, captions=captions, batch_size=1, val_fraction=0.2)
    cached(data, tmp_path / "out", text=False)
    options: dict[str, Any] = {"root": str(tmp_path / "out"), "batch_size": 1}
    from_cache, again = (CachedDataModule(**options, captions=captions) for _ in range(2))
    from_cache.setup()
    again.setup()

    def seen(loader: Iterable[dict[str, Any]]) -> set[tuple[str, str]]:
        return {(batch["key"][0], batch["caption"][0]) for _ in range(3) for batch in loader}

    drawn = seen(from_cache.train_dataloader())
    assert seen(again.train_dataloader()) == drawn
    assert len({caption for _, caption in drawn}) > 14
    for _, caption in drawn:
        trigger, *rest = caption.split(", ")
        assert trigger == "sks"
        assert set(rest) <= set("abcdef") or set(rest) <= set("gh")
    assert seen(from_cache.val_dataloader()) == seen(data.val_dataloader())


def test_a_cache_keeps_weights(tmp_path: Path) -> None:
    members = sample("a", 40, 40, weight=2.5) | sample("b", 40, 40)
    write(tmp_path / "s.tar", members)
    cached(module(tmp_path), tmp_path / "out")
    (batch,) = read_cache(tmp_path / "out").in_order("train")
    assert dict(zip(batch["key"], batch["weight"].tolist(), strict=True)) == {"a": 2.5, "b": 1.0}


def test_changes_of_captions_with_cached_text_are_refused(folder: Path, tmp_path: Path) -> None:
    cached(module(folder), tmp_path / "out")
    CachedDataModule(root=str(tmp_path / "out"), batch_size=1, captions=Captions())
    with pytest.raises(ValueError, match=r"^captions.trigger='sks' cannot .*cache with text=false"):
        CachedDataModule(root=str(tmp_path / "out"), batch_size=1, captions=Captions(trigger="sks"))


def test_an_unreadable_shard_is_retried(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(b"garbage")
    assert cached(module(folder), tmp_path / "out") == [str(folder / "b.tar")]
    assert len(rows(read_cache(tmp_path / "out"))) == 6
    (folder / "b.tar").write_bytes(whole)
    data = module(folder)
    assert cached(data, tmp_path / "out") == []
    assert rows(read_cache(tmp_path / "out")) == rows(data)


def test_duplicates_are_dropped_after_an_interrupted_build(folder: Path, tmp_path: Path) -> None:
    settings = {"filters": Filters(deduplicate=True)}
    cached(module(folder, **settings), tmp_path / "out")
    whole = rows(read_cache(tmp_path / "out"))
    (tmp_path / "out/train-00001.json").unlink()
    for path in (tmp_path / "out").glob("train-00001-*"):
        path.unlink()
    cached(module(folder, **settings), tmp_path / "out")
    assert rows(read_cache(tmp_path / "out")) == whole


def test_validation_is_rebuilt_when_it_has_grown(folder: Path, tmp_path: Path) -> None:
    def held_out(data: ImageTextDataModule) -> set[str]:
        return {caption for batch in data.val_dataloader() for caption in batch["caption"]}

    whole = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(b"garbage")
    cached(module(folder, val_fraction=0.4), tmp_path / "out")
    fewer = held_out(read_cache(tmp_path / "out"))
    (folder / "b.tar").write_bytes(whole)
    data = module(folder, val_fraction=0.4)
    cached(data, tmp_path / "out")
    assert held_out(read_cache(tmp_path / "out")) == held_out(data)
    assert fewer < held_out(data)


def test_processes_that_finish_simultaneously_do_not_conflict(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(module(folder), tmp_path / "out")
    modules, gate = [module(folder) for _ in range(4)], threading.Barrier(4)
    save = build_cache_module.save_file

    def save_and_wait(*arguments: Any) -> None:
        save(*arguments)
        gate.wait(timeout=20)  # all have written, and none has renamed its file yet

    monkeypatch.setattr(build_cache_module, "save_file", save_and_wait)
    with ThreadPoolExecutor(4) as threads:
        missing = threads.map(lambda data: cached(data, tmp_path / "out", world_size=4), modules)
        assert list(missing) == [[], [], [], []]
    assert rows(read_cache(tmp_path / "out")) == rows(module(folder))


def test_two_processes_share_the_shards_and_the_last_writes_the_manifest(
    folder: Path, tmp_path: Path
) -> None:
    first = cached(module(folder), tmp_path / "out", rank=0, world_size=2)
    assert [Path(name).name for name in first] == ["b.tar"]
    assert not (tmp_path / "out/cache.json").exists()
    assert cached(module(folder), tmp_path / "out", rank=1, world_size=2) == []
    assert rows(read_cache(tmp_path / "out")) == rows(module(folder))


def test_a_cache_without_a_readable_image_is_an_error(tmp_path: Path) -> None:
    members = sample("0")
    members["0.jpg"] = members["0.jpg"][:400]  # its size can be read, but not its pixels
    write(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match="nothing to train on, as no image"):
        cached(module(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out/cache.json").exists()
