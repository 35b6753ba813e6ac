"""A folder of images is decoded exactly as in training."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.io.images import decode_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 4), dtype=np.uint8)
IMAGES = {
    "RGB": Image.fromarray(PIXELS[..., :3].copy()),
    "RGBA": Image.fromarray(PIXELS),
    "LA": Image.merge("LA", [Image.fromarray(PIXELS[..., i].copy()) for i in (0, 1)]),
    "L": Image.fromarray(PIXELS[..., 0].copy()),
    "1": Image.fromarray(PIXELS[..., 0] > 127),
    "P": Image.fromarray(PIXELS[..., :3].copy()).quantize(16),
    "I;16": Image.fromarray(RNG.integers(0, 2**16, (6, 9), dtype=np.uint16)),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", IMAGES)
def test_the_folder_and_the_training_decoder_give_the_same_pixels(
    mode: str, orientation: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    IMAGES[mode].save(tmp_path / "a.png", exif=exif)
    expected = decode_image((tmp_path / "a.png").read_bytes())
    folder = ImageFolder(tmp_path)
    assert np.array_equal(np.asarray(folder.image(0)), expected)
    assert np.array_equal(next(iter(folder)).permute(1, 2, 0).numpy(), expected)
    assert folder.sizes() == [expected.shape[:2]]
    assert expected.shape[:2] == ((6, 9) if orientation < 5 else (9, 6))


def test_transparency_is_white_and_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(tmp_path / "gray.png")
    clear, gray = (np.asarray(ImageFolder(tmp_path).image(i)) for i in range(2))
    assert (clear == 255).all()
    assert (abs(gray.astype(int) - 128) <= 1).all()


def test_formats_that_start_programs_are_not_opened(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "EPS")
    (tmp_path / "drawing.png").write_bytes(data.getvalue())
    with pytest.raises(ValueError, match=r"drawing\.png is damaged"):
        ImageFolder(tmp_path).image(0)


def test_what_is_not_used_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    red = Image.new("RGB", (8, 8), "red")
    for name in ("1.png", "2.PNG", "3.bmp", "grid.png"):
        red.save(tmp_path / name)
    for name in ("._1.png", "4.heic", "notes.txt", "images.csv"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "more.png").mkdir()
    with caplog.at_level("INFO"):
        folder = ImageFolder(tmp_path)
    assert [path.name for path in folder.paths] == ["1.png", "2.PNG", "3.bmp"]
    assert caplog.messages == [
        f"images={tmp_path}: 3 images; not used: 1 x grid of samples, 1 x hidden file, "
        "1 x subfolder, 1 x unsupported image format"
    ]
    for path in folder.paths:
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"contains no images \(1 x grid of samples, "):
        ImageFolder(tmp_path)
