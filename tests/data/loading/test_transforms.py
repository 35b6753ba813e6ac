"""Crops and resized images."""

import numpy as np
import pytest
from PIL import Image

from tests.data.factories import encode, photo
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.loading.transforms import CENTER, crop_box, resize, salient_position
from wuerstchen_pl.data.sources.folder import FolderSource
from wuerstchen_pl.io.images import decode_image


@pytest.mark.parametrize("size", [(100, 37), (37, 100), (64, 64), (13, 7), (1, 500)])
@pytest.mark.parametrize("position", [(0.0, 0.0), CENTER, (1.0, 1.0)])
def test_a_crop_has_the_target_ratio_and_maximal_size(
    size: tuple[int, int], position: tuple[float, float]
) -> None:
    height, width = size
    left, top, right, bottom = crop_box(height, width, (48, 32), position)
    assert (right - left == width) or (bottom - top == height)
    assert min(left, top) >= 0 < min(right - left, bottom - top)
    assert right <= width
    assert bottom <= height
    # to the nearest pixel
    assert abs((right - left) - (bottom - top) * 32 / 48) <= 1
    assert abs(left - position[1] * (width - (right - left))) <= 0.5
    assert abs(top - position[0] * (height - (bottom - top))) <= 0.5


def test_resizing_matches_pils_bicubic() -> None:
    img = photo(300, 200)
    box = crop_box(200, 300, (96, 96), (0.0, 1.0))
    expected = np.asarray(img.resize((96, 96), Image.Resampling.BICUBIC, box=box)).astype(int)
    assert box == (100, 0, 300, 200)
    assert np.abs(resize(np.asarray(img), box, (96, 96)) - expected).max() <= 2


def test_resize_is_antialiased() -> None:
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    small = resize(np.stack([board] * 3, axis=-1), (0, 0, 256, 256), (16, 16))
    assert np.abs(small.astype(float) - 127.5).max() < 2


def test_a_strip_does_not_become_a_large_image() -> None:
    img = decode_image(encode(Image.new("RGB", (1, 20_000), (9, 8, 7)), "PNG"), cover=(512, 512))
    out = resize(img, crop_box(20_000, 1, (512, 512), (0.3, 0.3)), (512, 512))
    assert out.shape == (512, 512, 3)
    assert np.all(out == (9, 8, 7))


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("where", [0.1, 0.5, 0.85])
def test_the_salient_crop_contains_the_edges(where: float, across: bool) -> None:
    image = np.full((100, 400, 3), 200, dtype=np.uint8)
    middle = round(where * 400)
    patch = np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8)
    image[20:80, max(0, middle - 20) : middle + 20] = patch[:, : min(40, middle + 20)]
    if not across:
        image = image.transpose(1, 0, 2)
    image = np.ascontiguousarray(image)
    position = salient_position(image, (64, 64))
    left, top, right, bottom = crop_box(*image.shape[:2], (64, 64), position)
    first, last = (left, right) if across else (top, bottom)
    assert first <= max(0, middle - 20) + 7  # one thumbnail pixel is about two image pixels
    assert last >= middle + 20 - 7


def test_an_image_without_edges_is_cropped_in_the_center() -> None:
    position = salient_position(np.zeros((100, 300, 3), dtype=np.uint8), (64, 64))
    assert position == pytest.approx(CENTER, abs=0.02)


@pytest.mark.parametrize("position", [(0.0, 0.0), CENTER, (1.0, 0.25)])
def test_crop_share_crops_out_of_a_larger_image(position: tuple[float, float]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (256, 384, 3), dtype=np.uint8)
    left, top, right, bottom = crop_box(256, 384, (128, 128), position, 0.5)
    assert (bottom - top, right - left) == (128, 128)
    assert (top, left) == (round(position[0] * 128), round(position[1] * 256))
    cut = resize(image, (left, top, right, bottom), (128, 128))
    assert np.array_equal(cut, image[top:bottom, left:right])  # not resized


def test_crop_share_scales_max_upscale() -> None:
    module = ImageTextDataModule(
        source=FolderSource(root="nowhere"),
        image_size=128,
        batch_size=1,
        max_upscale=1.5,
        crop_share=0.5,
    )
    assert module.max_upscale == 0.75  # of the full crop: 1.5 for its half
    with pytest.raises(ValueError, match=r"^crop_share=1\.5 is out of range; use more than 0"):
        ImageTextDataModule(
            source=FolderSource(root="nowhere"), image_size=128, batch_size=1, crop_share=1.5
        )
