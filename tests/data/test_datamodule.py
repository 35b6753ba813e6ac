import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from wuerstchen_pl.data.buckets import nearest
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.openmoji import OpenMoji

Seen = list[tuple[int, int, int, tuple[str, ...], float]]


class Recorder(L.LightningModule):
    """Notes (epoch, step, batch, keys, sum of the pixels) of each batch that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: Seen = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        total = batch["image"].double().sum().item()
        place = (self.current_epoch, self.global_step, batch_idx)
        self.seen.append((*place, tuple(batch["key"]), total))
        return self.layer(batch["image"].mean().view(1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class ValidatingRecorder(Recorder):
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass


def data(source: OpenMoji, **changes: Any) -> ImageTextDataModule:
    settings: dict[str, Any] = {"image_size": 64, "batch_size": 5, "bucket_multiple": 16}
    return ImageTextDataModule(source=source, **settings | {"seed": 1} | changes)


def ready(source: OpenMoji, **changes: Any) -> ImageTextDataModule:
    module = data(source, **changes)
    module.prepare_data()
    module.setup()
    return module


def fit(
    source: OpenMoji,
    *,
    model: type[Recorder] = Recorder,
    save: ModelCheckpoint | None = None,
    ckpt: Path | None = None,
    num_workers: int = 0,
    **trainer: Any,
) -> Seen:
    recorder = model()
    L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=save is not None,
        callbacks=[] if save is None else [save],
        use_distributed_sampler=False,
        **trainer,
    ).fit(recorder, data(source, num_workers=num_workers), ckpt_path=ckpt, weights_only=False)
    return recorder.seen


def check_every_resume(source: OpenMoji, folder: Path, *, save: dict[str, Any], **run: Any) -> None:
    callback = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{step}", **save)
    whole = fit(source, save=callback, **run)
    files = {int(path.stem.split("=")[1]): path for path in folder.glob("*.ckpt")}
    assert len(files) >= 3
    for step, path in files.items():
        assert fit(source, ckpt=path, **run) == whole[step:], f"resumed at step {step}"


@pytest.mark.parametrize(
    ("save", "model", "val_check_interval"),
    [
        ({"every_n_train_steps": 1}, Recorder, 1.0),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, Recorder, 1.0),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, ValidatingRecorder, 1.0),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, ValidatingRecorder, 1.0),
        ({"every_n_train_steps": 1}, ValidatingRecorder, 2),
    ],
    ids=["steps", "epochs", "epochs-val", "after-val", "steps-val-mid-epoch"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_resumed_run_sees_what_the_unbroken_one_sees(
    openmoji: OpenMoji,
    tmp_path: Path,
    save: dict[str, Any],
    model: type[Recorder],
    val_check_interval: float,
) -> None:
    check_every_resume(
        openmoji, tmp_path, save=save, model=model, val_check_interval=val_check_interval
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_resume_and_order_do_not_depend_on_workers(openmoji: OpenMoji, tmp_path: Path) -> None:
    save = {"every_n_train_steps": 2}
    check_every_resume(openmoji, tmp_path, save=save, num_workers=2)
    assert fit(openmoji, num_workers=2) == fit(openmoji, num_workers=0)


@pytest.mark.slow
def test_spawned_workers_give_the_same_batches(openmoji: OpenMoji) -> None:
    expected = ready(openmoji).train_dataloader()
    loader = ready(openmoji, num_workers=1).train_dataloader()
    loader.multiprocessing_context = multiprocessing.get_context("spawn")
    for ours, theirs in zip(loader, expected, strict=True):
        assert ours["key"] == theirs["key"]
        assert torch.equal(ours["image"], theirs["image"])


def test_batches_keep_the_contract(openmoji: OpenMoji) -> None:
    module = ready(openmoji)
    captions = {s.key: s.caption for s in openmoji.samples("train")}
    loader = module.train_dataloader()
    assert len(loader) == len(captions) // 5 == len(list(loader))
    for batch in loader:
        image = batch["image"]
        assert image.dtype == torch.float32
        assert tuple(image.shape[2:]) in module.sizes
        assert 0 <= image.min() < 0.5 < image.max() <= 1
        assert len(batch["key"]) == len(image) == 5
        assert batch["caption"] == [captions[key] for key in batch["key"]]


def test_keeping_the_decoded_pictures_changes_nothing(openmoji: OpenMoji) -> None:
    plain, kept = (ready(openmoji, keep_decoded=keep).train_dataloader() for keep in (False, True))
    for _ in range(3):
        for ours, theirs in zip(kept, plain, strict=True):
            assert ours["key"] == theirs["key"]
            assert torch.equal(ours["image"], theirs["image"])


def test_crops_move_exactly_where_the_ratio_leaves_room(openmoji: OpenMoji) -> None:
    module = ready(openmoji)
    loader = module.train_dataloader()
    crops: dict[str, set[bytes]] = {}
    for _ in range(12):
        for batch in loader:
            for key, image in zip(batch["key"], batch["image"], strict=True):
                crops.setdefault(key, set()).add(image.numpy().tobytes())
    moved = 0
    for sample in openmoji.samples("train"):
        height, width = nearest(sample.width, sample.height, module.sizes)
        scale = max(height / sample.height, width / sample.width)
        room = round(sample.height * scale) - height + round(sample.width * scale) - width
        assert len(crops[sample.key]) <= room + 1
        if room >= 3:
            assert len(crops[sample.key]) > 1, f"{sample.caption} never moves in {room} pixels"
            moved += 1
    assert moved > 3


def test_validation_is_the_same_each_time_and_covers_the_split(openmoji: OpenMoji) -> None:
    module = ready(openmoji, val_batch_size=2)
    first, second = (list(module.val_dataloader()) for _ in range(2))
    keys = Counter(key for batch in first for key in batch["key"])
    assert keys == Counter(s.key for s in openmoji.samples("val"))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))


def test_sizes_are_known_before_any_data(tmp_path: Path) -> None:
    source = OpenMoji(root=str(tmp_path), image_size=64)
    assert (64, 64) in data(source).sizes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["batch_size", "val_batch_size", "num_workers"])
def test_numbers_out_of_range_are_refused_by_name(openmoji: OpenMoji, key: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.{key} is -1"):
        data(openmoji, **{key: -1})
