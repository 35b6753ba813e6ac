"""Training data as prompts and references: captions without decoding, unreadable images skipped."""

import base64
import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen_pl.batch import Batch
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.loading import batch_dataset
from wuerstchen_pl.data.sources.folder import FolderSource
from wuerstchen_pl.evaluation import image_losses
from wuerstchen_pl.evaluation.dataset_metrics import retrievals
from wuerstchen_pl.evaluation.datasets import DatasetImages
from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.pipelines.text_to_image import TextToImage

NUM_IMAGES, BROKEN = 8, 3


@pytest.fixture
def images(tmp_path: Path) -> DatasetImages:
    """Images of uniform brightness ``10 * number``; one is truncated."""
    for number in range(NUM_IMAGES):
        path = tmp_path / f"images/{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (10 * number,) * 3).save(path)
        path.with_suffix(".txt").write_text(f"number {number}")
    broken = tmp_path / f"images/{BROKEN}.jpg"
    broken.write_bytes(broken.read_bytes()[:-60])
    data = ImageTextDataModule(
        source=FolderSource(root=str(tmp_path / "images")),
        image_size=64, bucket_multiple=16, batch_size=3, val_fraction=0.0, num_workers=0,
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    return DatasetImages(data)


def test_captions_are_read_without_decoding(
    images: DatasetImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_dataset, "decode_image", pytest.fail)
    samples = images.captioned(None)
    assert [s.caption for s in samples] == [f"number {i}" for i in range(NUM_IMAGES)]
    assert [s.dataset_index for s in samples] == list(range(NUM_IMAGES))
    assert {(s.height, s.width) for s in samples} == {(64, 64)}


def test_indices_of_images_are_those_of_their_captions(images: DatasetImages) -> None:
    with pytest.warns(UserWarning, match="unreadable image"):
        by_index = dict(images.indexed())
    assert by_index.keys() == set(range(NUM_IMAGES)) - {BROKEN}
    for index, image in by_index.items():
        assert torch.equal(image, torch.full((3, 64, 64), 10 * index, dtype=torch.uint8))


def test_an_unreadable_batch_yields_no_substitute(images: DatasetImages) -> None:
    images.data.val_batch_size = 1
    with pytest.warns(UserWarning, match="unreadable image"):
        indices = [index for index, _ in images.indexed()]
    assert indices == [i for i in range(NUM_IMAGES) if i != BROKEN]


def test_targets_after_an_unreadable_image_are_found(images: DatasetImages, tmp_path: Path) -> None:
    """Each caption's own image is retrieved; the image of the unreadable target is not counted."""
    (tmp_path / "generated").mkdir()
    for number in range(NUM_IMAGES):
        Image.new("RGB", (64, 64), (10 * number,) * 3).save(tmp_path / f"generated/{number}.png")
    generated, pipeline = ImageFolder(tmp_path / "generated"), cast(TextToImage, None)
    with pytest.warns(UserWarning, match="unreadable image"):
        scores = retrievals(generated, range(NUM_IMAGES), images, pipeline)
    assert scores["retrieval/top1"].value == 1
    assert scores["retrieval/top1"].number == NUM_IMAGES - 1
    assert scores["retrieval_shuffled/top1"].value == 0


class MeanOfMask(torch.nn.Linear):
    """Its loss at each of two times is the mean of an image's mask, times ``in_features``."""

    def validation_losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        torch.testing.assert_close(batch["image"][:, :1], 1 - batch["mask"])
        means = batch["mask"].mean((1, 2, 3))[:, None].repeat(1, 2) * self.in_features
        return torch.full_like(means, 0.5), means


@pytest.fixture
def masked(tmp_path: Path) -> ImageTextDataModule:
    """Number ``n`` of six black images has a mask of ``n / 5``, and white where it is 0."""
    for number in range(6):
        path = tmp_path / f"{number}.png"
        Image.new("LA", (64, 64), (0, 51 * number)).save(path)
        path.with_suffix(".txt").write_text(f"number {number}")
    data = ImageTextDataModule(
        source=FolderSource(root=str(tmp_path)), image_size=64, bucket_multiple=16, batch_size=1,
        val_fraction=0.5, mask="alpha", num_workers=0,
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    return data


def test_each_image_of_both_splits_has_its_own_loss(masked: ImageTextDataModule) -> None:
    """And the loss is measured on images and masks in the range of the contract."""
    stages: Any = {"b": MeanOfMask(2, 1), "c": MeanOfMask(1, 1)}
    scores, splits = image_losses.image_losses(stages, masked)
    assert [split.file for split in splits] == ["val_losses.csv", "train_losses.csv"]
    assert sorted(name for split in splits for name in split.names) == [
        f"{i}.png" for i in range(6)
    ]
    for images, suffix in zip(splits, ("", "_train"), strict=True):
        levels = [int(name[0]) / 5 for name in images.names]
        assert images.prompts == tuple(f"number {name[0]}" for name in images.names)
        assert images.scores[f"stage_c{suffix}/loss"] == pytest.approx(levels)
        assert images.scores[f"stage_b{suffix}/loss"] == pytest.approx([2 * x for x in levels])
        assert scores[f"stage_c{suffix}/loss"].value == pytest.approx(sum(levels) / len(levels))
        for source, level in zip(images.sources, levels, strict=True):
            encoded = source.removeprefix("data:image/jpeg;base64,")
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
            assert np.abs(shown - 255 * (1 - level)).max() < 3
    assert {name for name in scores if "_t" in name and "train" not in name} == {
        "stage_b/loss_t0.55", "stage_c/loss_t0.55",
    }  # fmt: skip


def test_of_many_training_images_evenly_spaced_ones_are_measured(
    masked: ImageTextDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_losses, "MAX_TRAINING_IMAGES", 2)
    stages: Any = {"c": MeanOfMask(1, 1)}
    validation, training = image_losses.image_losses(stages, masked)[1]
    keys = [sample.key for sample in masked.splits.first_window["train"]]
    assert len(validation.names) == 2
    assert list(training.names) == keys[::2] != keys
