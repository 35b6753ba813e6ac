"""Every key of every source and of the data module takes effect, or is refused."""

import hashlib
import inspect
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.data.factories import FakeSource, sample, shards, write
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.loading.captions import Captions
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.sources.folder import FolderSource
from wuerstchen_pl.data.sources.hub import HubDataset
from wuerstchen_pl.data.sources.mix import Mix
from wuerstchen_pl.data.sources.openmoji import OpenMoji
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.data.sources.source import Source

Build = Callable[..., Any]
SPEED = {"download_dir", "download_gb", "keep_decoded"}
"""Keys that change how fast data are read, but not which; they have tests of their own."""


def outcome(build: Build, observe: Callable[[Any], object], keys: dict[str, Any]) -> object:
    """What is observed with these keys, or the error that refuses them."""
    try:
        return observe(build(**keys))
    except (ValueError, OSError) as error:
        return str(error)


def check_keys(
    build: Build,
    observe: Callable[[Any], object],
    base: dict[str, Any],
    changes: dict[str, dict[str, Any]],
) -> None:
    keys = inspect.signature(build).parameters.keys() - SPEED
    assert changes.keys() == keys, "each key needs a change that must show"
    unchanged = outcome(build, observe, base)
    assert unchanged == outcome(build, observe, base)
    silent = [key for key, c in changes.items() if outcome(build, observe, base | c) == unchanged]
    assert not silent, f"changing these keys changes nothing: {silent}"


def contents(source: Source) -> object:
    """The groups of both splits, and every sample with its image."""
    source.prepare()
    result = []
    for split in ("train", "val"):
        for group in source.groups(split):
            indexes = [source.open(shard) for shard in group.shards]
            samples = [
                (s.captions, s.width, s.height, hashlib.sha256(source.read(s)).hexdigest())
                for index in indexes
                for s in index.samples
            ]
            result.append((split, group, samples))
    return result


def saved_tables(root: Path) -> tuple[str, str]:
    """A saved dataset with two splits, and another one with a single unnamed split."""
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    features = datasets.Features(
        {
            **{name: datasets.Image() for name in ("image", "other")},
            **{name: datasets.Value("string") for name in ("text", "title")},
        }
    )

    def table(first: int) -> Any:
        rows = [
            {
                "image": Image.new("RGB", (8 + i, 8)),
                "other": Image.new("RGB", (8, 8 + i)),
                "text": f"text {i}",
                "title": f"title {i}",
            }
            for i in range(first, first + 3)
        ]
        return datasets.Dataset.from_list(rows, features=features)

    datasets.DatasetDict(train=table(0), test=table(3)).save_to_disk(str(root / "splits"))
    table(6).save_to_disk(str(root / "single"))
    return str(root / "splits"), str(root / "single")


def test_every_key_of_a_saved_dataset(tmp_path: Path) -> None:
    splits, single = saved_tables(tmp_path)
    changes: dict[str, dict[str, Any]] = {
        "name": {"name": single},
        "config": {"config": "x"},
        "split": {"split": "test"},
        "val_split": {"val_split": "test"},
        "image_column": {"image_column": "other"},
        "caption_column": {"caption_column": "title"},
        "revision": {"revision": "main"},
    }
    check_keys(HubDataset, contents, {"name": splits}, changes)
    check_keys(HubDataset, contents, {"name": single}, changes | {"name": {"name": splits}})


@pytest.mark.parametrize("key", ["split", "val_split"])
def test_a_split_that_a_saved_dataset_lacks_is_refused(key: str, tmp_path: Path) -> None:
    for name, has in zip(saved_tables(tmp_path), ("train, test", "train"), strict=True):
        source = HubDataset(name=name, **{key: "nonsense"})
        with pytest.raises(ValueError, match=rf"data.{key}='nonsense' is .* has only {has}; use"):
            source.prepare()
    with pytest.raises(ValueError, match="val_split='train' is also the training split"):
        HubDataset(name="any", val_split="train")


def test_every_key_of_shards(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        shards(tmp_path / name, 2, 3, first=10 * number)
    base = {"urls": str(tmp_path / "a")}
    changes: dict[str, dict[str, Any]] = {
        "urls": {"urls": str(tmp_path / "b")},
        "val_urls": {"val_urls": str(tmp_path / "b")},
        "caption_lines": {"caption_lines": True},
    }
    write(tmp_path / "a/lines.tar", sample("lines") | {"lines.txt": b"one\ntwo"})
    pipe = {"urls": f"pipe:cat {tmp_path / 'a/00000.tar'}"}
    refused, allowed = (
        outcome(ShardSource, lambda s: s.urls, pipe | more) for more in ({}, {"allow_pipe": True})
    )
    assert "would run a command" in str(refused)
    assert refused != allowed
    tested_above = {"allow_pipe": {"urls": pipe["urls"]}}
    check_keys(ShardSource, contents, base, changes | tested_above)


def test_every_key_of_a_folder(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / f"{name}.png")
        (tmp_path / name / f"{name}.txt").write_text(f"{name}\n{name}")
    base, other = ({"root": str(tmp_path / name)} for name in "ab")
    check_keys(
        FolderSource, contents, base, {"root": other, "caption_lines": {"caption_lines": True}}
    )


def test_every_key_of_openmoji(tmp_path: Path) -> None:
    base = {"root": str(tmp_path), "image_size": 8, "limit": 3}
    changes: dict[str, dict[str, Any]] = {
        "root": {"root": str(tmp_path / "elsewhere")},
        "image_size": {"image_size": 16},
        "groups": {"groups": ["food-drink"]},
        "limit": {"limit": 4},
    }
    check_keys(OpenMoji, contents, base, changes)


def test_every_key_of_a_mixture() -> None:
    one, two = (FakeSource.with_sizes({name: 3}) for name in ("one", "two"))
    changes: dict[str, dict[str, Any]] = {
        "sources": {"sources": {"a": one}},
        "weights": {"weights": {"a": 2.0}},
    }
    check_keys(Mix, contents, {"sources": {"a": one, "b": two}}, changes)


def batches(data: ImageTextDataModule) -> object:
    """The first batches of training, all of validation, and the number of decoding processes."""
    data.prepare_data()
    data.setup()
    workers = data.loader_options()["num_workers"]
    data.num_workers = 0
    try:
        loaded = [*islice(data.train_dataloader(), 12), *data.val_dataloader()]
        return workers, [
            (b["key"], b["caption"], b["image"].sum().item(), "mask" in b) for b in loaded
        ]
    finally:
        data.teardown()


def test_every_key_of_the_data_module() -> None:
    captions = ("one", "another", "a third")
    source = FakeSource.with_sizes({f"{n}.tar": 9 for n in range(4)}, captions=captions)
    base = {"source": source, "image_size": 32, "batch_size": 2, "val_fraction": 0.3}
    base["bucket_multiple"] = 8
    sizes: dict[str, Any] = {"buckets": "sizes", "sizes": [[32, 32], [32, 64]]}
    changes: dict[str, dict[str, Any]] = {
        "source": {"source": FakeSource.with_sizes({"x.tar": 9})},
        "image_size": {"image_size": 64},
        "batch_size": {"batch_size": 3},
        "val_batch_size": {"val_batch_size": 1},
        "val_fraction": {"val_fraction": 0.6},
        "num_workers": {"num_workers": 1},
        "seed": {"seed": 1},
        "buckets": {"buckets": "paper"},
        "bucket_multiple": {"bucket_multiple": 32},
        "ratios": {"ratios": [1.0]},
        "sizes": sizes,
        "max_upscale": {"max_upscale": 0.9},
        "crop": {"crop": "center"},
        "crop_share": {"crop_share": 0.5},
        "filters": {"filters": Filters(min_size=33)},
        "captions": {"captions": Captions(trigger="sks")},
        "mask": {"mask": "alpha"},
        "control": {"control": True},
        "shuffle_samples": {"shuffle_samples": 1},
        "max_bad_fraction": {"max_bad_fraction": -1},
    }
    check_keys(ImageTextDataModule, batches, base, changes)
    other_sizes = sizes | {"sizes": [[32, 32]]}
    one, other = (outcome(ImageTextDataModule, batches, base | s) for s in (sizes, other_sizes))
    assert one != other
